"""Finding memories: how texts become terms, how terms are kept, and how messages are ranked.

    text, english         a text into tokens, tokens into terms
    terms                 which terms a message has and how much each counts; those of a query
    entries, segments     how terms are kept: of a new message, and of many
    vocabulary            the words that occur, for those who look for a part of one
    upkeep                when entries become segments, and segments larger ones
    scoring, finder       candidates and scores for a query; one search from its text to records
    semantic              vectors of messages, beside the words or in their place
    in_memory, memory_vectors   an index, and vectors, in the memory of a process

Nothing but the last two knows where an index is kept: the redis backend has it in hashes, and ranks
in the same way (`recallq_worker.backends.redis`).
"""
