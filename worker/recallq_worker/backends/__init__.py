"""Memory backends: what keeps, finds and forgets messages. None of them knows of Celery."""
