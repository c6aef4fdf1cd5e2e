"""Finding memories: how texts become terms, how terms are kept, and how messages are ranked.

    text, english    a text into tokens, tokens into terms
    terms            which terms a message has, and how much each counts
    segments         the index: what is new, message by message, and the rest, in sorted segments
    upkeep           when and how new messages become segments, and segments larger ones
    scoring          candidates and scores for a query
    fusion           keywords and vectors together

Nothing here knows where an index is kept: the in_memory backend has it in dictionaries, the redis
backend in hashes, and both rank in the same way.
"""
