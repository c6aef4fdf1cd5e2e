"""English: words that say nothing by themselves, and what the forms of a word share.

Regular forms are Snowball's business (PyStemmer); the table has the irregular ones, which no
stemmer knows: who asks where somebody *went* means that they *go* there.
"""

from __future__ import annotations

from functools import lru_cache
from threading import local

import Stemmer

_STOP_WORDS = """
a about above after again against all also am an and any are aren as at be because been before being
below between both but by can cannot could couldn d did didn do does doesn doing don down during
each few for from further get got had hadn has hasn have haven having he her here hers herself him
himself his how i if in into is isn it its itself just ll m me more most my myself no nor not now of
off on once only or other our ours ourselves out over own re s same she should shouldn so some such
t than that the their theirs them themselves then there these they this those through to too under
until up us ve very was wasn we were weren what when where which while who whom whose why will with
would wouldn you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

_IRREGULAR = """
begin began begun; bend bent; bite bit bitten; bleed bled; blow blew blown; break broke broken;
breed bred; bring brought; build built; burn burnt; buy bought; catch caught; choose chose chosen;
come came; creep crept; dig dug; draw drew drawn; dream dreamt; drink drank drunk;
drive drove driven; eat ate eaten; fall fell fallen; feed fed; feel felt; fight fought; find found;
flee fled; fly flew flown; forbid forbade forbidden; forget forgot forgotten;
forgive forgave forgiven; freeze froze frozen; give gave given; go went gone; grow grew grown;
hang hung; hear heard; hide hid hidden; hold held; keep kept; kneel knelt; know knew known;
lay laid; lead led; learn learnt; leave left; lend lent; light lit; lose lost; make made;
mean meant; meet met; pay paid; ride rode ridden; ring rang rung; rise rose risen; run ran;
say said; see saw seen; seek sought; sell sold; send sent; sew sewn; shake shook shaken;
shine shone; shoot shot; show shown; shrink shrank; sing sang sung; sink sank sunk; sit sat;
sleep slept; slide slid; speak spoke spoken; spend spent; spin spun; stand stood;
steal stole stolen; stick stuck; sting stung; strike struck; swear swore sworn; sweep swept;
swim swam swum; swing swung; take took taken; teach taught; tear tore torn; tell told;
think thought; throw threw thrown; understand understood; wake woke woken; wear wore worn;
weave wove woven; weep wept; win won; wind wound; write wrote written; child children; foot feet;
goose geese; half halves; knife knives; leaf leaves; life lives; man men; mouse mice;
person people; shelf shelves; thief thieves; tooth teeth; wife wives; wolf wolves; woman women;
bad worse worst; good better best
"""
_BASE: dict[str, str] = {}
for _line in _IRREGULAR.split(";"):
    _base, *_forms = _line.split()
    _BASE |= dict.fromkeys(_forms, _base)

_threads = local()
"""A stemmer belongs to a thread."""


@lru_cache(maxsize=16_384)
def stem(word: str) -> str:
    """What the forms of an English word share; `word` is folded."""
    stemmer = getattr(_threads, "stemmer", None)
    if stemmer is None:
        stemmer = _threads.stemmer = Stemmer.Stemmer("english", 0)  # the cache is ours
    stemmed: str = stemmer.stemWord(_BASE.get(word, word))
    return stemmed
