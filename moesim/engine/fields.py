"""Where the compiled engine keeps what: names of rows and columns of its integer arrays.

Everything is int64. One array holds the scalars, one the facts of each key, one the seats' state of
each expert, one those of each cache; the others are queues and the block of the workload under way.
"""

from __future__ import annotations

from enum import IntEnum, auto

from moesim.tally import Counts


class _Rows(IntEnum):
    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count


class S(_Rows):
    """Scalars."""

    # What several devices share stands first: it is theirs in turn.
    NOW = auto()
    SEQ = auto()
    """Creation order of pending events."""
    EVENT = auto()
    CLOCK = auto()
    """The seats' clock."""
    PHASE = auto()
    GATE_STEP = auto()
    GATE_LAYER = auto()
    UNSERVED = auto()
    """The plan of the newest gate is still being paid for: its misses are not yet loads."""
    N_NOTES = auto()
    N_SPANS = auto()
    LOG_WORDS = auto()
    LOG_SUM = auto()
    CHOICE_WORDS = auto()
    CHOICE_SUM = auto()
    HELD = auto()
    PEAK = auto()
    # What is a device's own, or of the whole run.
    STEP = auto()
    """Row of the step under way in the block."""
    ROW = auto()
    """Row of the layer event under way in the block."""
    # The compute lane: its pending event (time, rank, order) and what it is.
    C_TIME = auto()
    C_RANK = auto()
    C_SEQ = auto()
    C_DOES = auto()
    C_SPAN = auto()
    """When it began waiting or computing."""
    C_KEY = auto()
    NEXT_HIT = auto()
    COMPUTED = auto()
    WAITING = auto()
    """Experts that will arrive for the layer event."""
    CPU_RUNNING = auto()
    BLOCKED = auto()
    # The link.
    L_TIME = auto()
    L_RANK = auto()
    L_SEQ = auto()
    L_KEY = auto()
    L_LAST = auto()
    """Chunks that will have moved when it ends."""
    L_SPAN = auto()
    BACK = auto()
    """When the other direction will have sent all that left, or how long that will take."""
    STAGED = auto()
    TSEQ = auto()
    """Transfers made so far."""
    D_HEAD = auto()
    D_TAIL = auto()
    P_COUNT = auto()
    A_HEAD = auto()
    A_TAIL = auto()
    R_COUNT = auto()
    N_DEMAND = auto()
    # Host workers.
    H_HEAD = auto()
    H_TAIL = auto()
    ASLEEP_HEAD = auto()
    ASLEEP_TAIL = auto()
    AWAKE = auto()
    """Workers that have a pending event."""
    # The plan under way.
    N_CANCEL = auto()
    N_PLAN = auto()
    # Forecasts.
    COMMISSION = auto()
    """What the newest gate foresees, in ``M.fore``; -1: nothing, or the queue is full."""
    OWED_OPS = auto()
    OWED_BYTES = auto()
    """Work of forecasts that were dropped, which the next job must do."""
    N_WISHED = auto()
    N_FRESH = auto()
    JOBS_MADE = auto()
    W_HEAD = auto()
    W_TAIL = auto()
    """Of the jobs that wait for a host worker."""
    # What a policy in plain Python is asked and told.
    FAILED = auto()
    """It raised, or broke the protocol."""
    FOREGROUND = auto()
    """What its plan costs on the critical path, in ns."""
    VISITED = auto()
    """Python has seen the beginning of the step, or its end."""
    FLOOR = auto()
    """Score of the victim chosen last."""
    N_CANDIDATES = auto()
    LACKING = auto()
    """Bytes that must be freed."""
    MAY_FREE = auto()
    """Bytes of the candidates."""
    JOBS = auto()
    """Submitted and not yet done."""
    JOBS_QUEUED = auto()
    # Host memory and the drive.
    N_READS = auto()
    """Demanded copies that wait for the drive."""
    READ_LAST = auto()
    """Chunks that there will be when the read under way ends."""
    DRAM_USED = auto()
    READS = auto()
    BYTES_READ = auto()
    READ_NS = auto()
    DRAM_HITS = auto()
    DRAM_MISSES = auto()
    DRAM_EVICTIONS = auto()
    DRAM_EVICTED = auto()
    """Bytes."""
    # Counts.
    PLANNED = auto()
    OVERTAKEN = auto()
    DROPPED = auto()
    ISSUED = auto()
    USED = auto()
    LATE = auto()
    WASTED = auto()
    CANCELLED = auto()
    UNUSED_AT_END = auto()
    USED_BYTES = auto()
    LATE_BYTES = auto()
    WASTED_BYTES = auto()
    CANCELLED_BYTES = auto()
    UNUSED_AT_END_BYTES = auto()
    POLLUTING = auto()
    EVICTIONS = auto()
    EVICTED_BYTES = auto()
    LINK_BUSY = auto()
    MOVED_OF_CANCELLED = auto()
    IN_FLIGHT_BYTES = auto()
    PREDICTED = auto()
    NAMED = auto()
    LARGEST_UNION = auto()
    OVERFLOWS = auto()
    SERVED_FETCH = auto()
    SERVED_CPU = auto()
    SERVED_SKIP = auto()
    # Times.
    T_DENSE = auto()
    T_EXPERTS = auto()
    T_SYNC = auto()
    T_PLAN = auto()
    T_STALL = auto()
    T_CPU = auto()
    T_IDLE = auto()
    T_EXCHANGE = auto()
    # Several devices.
    AT_WORK = auto()
    """Devices that still compute the layer event."""
    EXCHANGE_NS = auto()
    """What its tokens' travel takes."""
    LINKS = auto()
    """Links that draw on the host."""
    SLOWEST = auto()
    """Layer events that this device ended last."""
    WAS_EXPERTS = auto()
    """Of a device: its times when the layer event began."""
    WAS_STALL = auto()
    WAS_CPU = auto()
    A_EXPIRES = auto()
    """What a device is asked to wish for."""
    A_PRIORITY = auto()
    A_ORDINAL = auto()
    A_REPLACES = auto()
    A_PHASE = auto()


SHARED = int(S.PEAK) + 1
"""How many scalars devices share."""


class O(IntEnum):  # noqa: E742
    """Options and shapes: constant in a run; they stand behind the scalars."""

    LAYERS = len(S)
    EXPERTS = auto()
    SIZE = auto()
    KEYS = auto()
    CACHES = auto()
    RING = auto()
    """Width of the queues less one; the width is a power of two."""
    ORDER = auto()
    """How the residents of a cache are kept in order (``Order``)."""
    HEAPS = auto()
    """How many heaps a cache has."""
    QUICK = auto()
    """A layer event without waves may be served in closed form."""
    UNIT = auto()
    """Bytes of every expert, where they are equal; else 0."""
    LOAD = auto()
    """What a load takes, where they are equal."""
    LOG = auto()
    HOST = auto()
    """Address of the function that asks the policy; 0: it is made of built-in seats."""
    ROUTES = auto()
    LISTENS = auto()
    """Whether the policy hears notes."""
    KEEP = auto()
    PREFETCH = auto()
    MISS = auto()
    BYPASS = auto()
    BARRIER = auto()
    STAGING = auto()
    WRITE_BACK = auto()
    """What happens to copies that leave (``Back``)."""
    SYNC = auto()
    PLAN = auto()
    DISTANCE = auto()
    CANCEL = auto()
    DECODE_FROM = auto()
    FACTOR = auto()
    FORGETS = auto()
    """Whether an eviction forgets visits (MAP_FREQUENCY)."""
    UNKNOWN = auto()
    """What is expected of every expert when a pass begins; -1: what was expected last."""
    SEED = auto()
    CHUNK = auto()
    WORKERS = auto()
    ACTORS = auto()
    """With the drive, if there is one."""
    SPANS = auto()
    RUN_EVENTS = auto()
    """Layer events of the whole run, where the future is known."""
    ONE_VICTIM = auto()
    """A load evicts one copy at most."""
    PRICE = auto()
    """Address of the function that tells what a job takes."""
    SIGHTS = auto()
    """Address of the function that carries out forecasts."""
    TIER = auto()
    """Address of the function that keeps host memory; 0: it holds every expert."""
    DRAM = auto()
    """Its room for experts."""
    SHELF = auto()
    """Column of the head of the list of what is in it."""
    READ_CHUNK = auto()
    QUEUE = auto()
    """Jobs of forecasts that may wait."""
    BACKGROUND = auto()
    REFRESH = auto()
    RENEW = auto()
    DEVICES = auto()
    """How many there are; 0: one, which is this machine itself."""
    DEVICE = auto()
    """Address of the function that is all that a device does."""
    PLACE = auto()
    """Of a device: where its machine lies."""
    NUMBER = auto()
    """Of a device: its own."""
    FIRST_CACHE = auto()
    """Of a device: the first of its caches, which follow each other."""
    SHARES = auto()
    """Where the host cannot serve all links at their own rate: kinds of copy; else 0."""


class K(_Rows):
    """Facts of a key: of its copy, and of the load under way or the last one."""

    CACHE = auto()
    BYTES = auto()
    COPY = auto()
    PLACE = auto()
    CURVE = auto()
    PINNED = auto()
    MEMBER = auto()
    """The layer event that demanded it last."""
    ROW = auto()
    """Its row in that event's demand."""
    AT = auto()
    """Its place among its cache's residents, or in its heap; not where they are a list."""
    HEAP = auto()
    """The heap that it belongs to: one for each cache, or for each layer."""
    BEFORE = auto()
    """In a list: the resident that goes before it, or the head of its cache's list. In SLRU the
    list of the protected ones."""
    AFTER = auto()
    EVENT = auto()
    """The layer event that asked for its load."""
    ORDINAL = auto()
    """Its place in that event's demand or plan."""
    REPLACES = auto()
    """The key whose place its load takes, or -1."""
    PHASE = auto()
    TSEQ = auto()
    PRIORITY = auto()
    EXPIRES = auto()
    SENT = auto()
    IS_PREFETCH = auto()
    IS_STAGED = auto()
    IS_DEMANDED = auto()
    IS_CANCELLED = auto()
    IS_ISSUED = auto()
    PENDING = auto()
    """In the prefetch lane."""
    UNUSED = auto()
    HELD = auto()
    HOLD_PRIORITY = auto()
    HOLD_EXPIRES = auto()
    BLAMED = auto()
    """The prefetch that evicted it, or -1."""
    BLAMED_SEQ = auto()
    VICTIM = auto()
    """What its load evicted last, or -1."""
    NAMED = auto()
    WISHED = auto()
    """The layer event whose plan wished for it last."""
    CPU_NS = auto()
    LOAD_NS = auto()
    IS_NEAR = auto()
    """In host memory, whole."""
    READ_SENT = auto()
    """Chunks of it that are there; -1: none of it."""
    READ_CURVE = auto()
    SHELF_BEFORE = auto()
    """In the list of what is in host memory: what was used before it."""
    SHELF_AFTER = auto()
    USES = auto()
    """How many read from the copy in host memory, or are about to."""
    NEEDED = auto()
    """What demand waits for it, by ``reads``; 0: none."""
    SHARE = auto()
    """The probability with which a forecast wished for it."""
    DUE = auto()
    """The layer event of that forecast; -1: none wishes for it."""
    OWNER = auto()
    """The device that owns it."""


class X(IntEnum):
    """The keep seat's state of an expert; it stands behind the facts of its key."""

    SCORE = len(K)
    COUNT = auto()
    LAST = auto()
    SEGMENT = auto()


class C(_Rows):
    """Facts of a cache."""

    CAPACITY = auto()
    WHOLE = auto()
    """Its capacity without a KV cache."""
    USED = auto()
    RESIDENTS = auto()
    FIRST = auto()
    """Its first place in the array of residents."""
    HEAP = auto()
    """Of a heap: its first place in that array."""
    HEAPED = auto()
    """Of a heap: how many it holds."""
    SLOPE = auto()
    """Of a heap of LFRU: what a use adds to a rank."""
    CEILING = auto()
    """Of a heap of LFRU: what lies beyond the newest rank scores at least so much."""
    SHARP = auto()
    """Of a heap of LFRU: how close the ceiling is put to the least score."""
    SPENT = auto()
    """Of a heap of LFRU: residents looked at in vain since the slope was chosen."""
    LEAST = auto()
    """Of a heap of LFRU: the least score found last."""
    PROTECTED = auto()
    LIMIT = auto()


class D(_Rows):
    """Columns of the demand of the layer event under way, and of a block's demand."""

    EXPERT = auto()
    TOKENS = auto()
    PHASE = auto()
    NS = auto()
    CPU_NS = auto()
    NEXT_USE = auto()
    STATUS = auto()
    SERVE = auto()


class E(_Rows):
    """Columns of a block's layer events."""

    LAYER = auto()
    DENSE_NS = auto()
    """-1: no dense part (an access of flat mode)."""
    FIRST = auto()
    COUNT = auto()
    PHASE = auto()
    MIXED = auto()
    """Whether its demand is of both phases."""
    PLAN = auto()
    """First row of the predictions read at its gate."""
    PLANS = auto()
    STEP = auto()
    """Number of its step in the run."""
    SIGHT = auto()
    """Where what its gate foresees lies in ``M.fore``; -1: nothing."""
    OWED_NS = auto()
    """What foreseeing costs on its critical path."""
    EXCHANGE_NS = auto()
    """What its tokens' travel between devices takes."""


class T(_Rows):
    """Columns of a block's steps."""

    FIRST = auto()
    LAST = auto()
    HEAD_NS = auto()
    BEGIN_NS = auto()
    END_NS = auto()
    STALL_NS = auto()
    MISSES = auto()
    BEGINS = auto()
    """Whether an iteration begins with it."""
    VISIT = auto()
    """Python must see its beginning and its end."""
    SIGHT = auto()
    """Where what its beginning foresees lies in ``M.fore``."""
    SIGHTS = auto()
    """How many facts of its beginning foresee anything."""
    END_SIGHT = auto()
    END_SIGHTS = auto()
    """The same of its end."""


class N(_Rows):
    """Columns of the counts of a phase, in the order of ``tally.Counts``."""

    ACCESSES = auto()
    HITS = auto()
    LATE_HITS = auto()
    MISSES = auto()
    LOADS = auto()
    BYTES_LOADED = auto()
    ACCESS_BYTES = auto()
    HIT_BYTES = auto()
    LATE_BYTES = auto()
    MISS_BYTES = auto()


assert tuple(name.lower() for name in N.__members__) == Counts.__slots__


class W(_Rows):
    """Facts of a host worker."""

    TIME = auto()
    RANK = auto()
    SEQ = auto()
    KEY = auto()
    SPAN = auto()
    JOB = auto()
    """Row of ``M.jobs`` of the job that it does."""


class Q(_Rows):
    """Queues and lists, each a row as wide as the keys need."""

    DEMAND = auto()
    """Ring: demand that waits for the link, or is on it."""
    PREFETCH = auto()
    """The prefetch lane, most urgent first."""
    ARRIVED = auto()
    """Ring: demanded copies that have not computed."""
    RELEASED = auto()
    """Members that have computed, oldest first."""
    HOST = auto()
    """Ring: experts that wait for a host worker."""
    ASLEEP = auto()
    """Ring: workers without work."""
    RESIDENT = auto()
    """Residents, cache after cache or heap after heap."""
    RANK = auto()
    """The rank that each resident in a heap had when it was last put in its place."""
    VICTIMS = auto()
    FULL = auto()
    """Places without room, while the link looks for what may go."""
    CANDIDATES = auto()
    """What a policy may name as victims."""
    STACK = auto()
    ONE = auto()
    WISHED = auto()
    """Keys that a forecast wishes for and whose layer event is to come."""
    FRESH = auto()
    """Keys whose priority has changed since the last gate."""
    FRESHER = auto()
    """Their priorities."""
    JOBS = auto()
    """Ring: jobs that wait for a host worker."""
    READS = auto()
    """Demanded copies that wait for the drive, oldest first."""


class Keep(IntEnum):
    """Keep seats. Up to ``MIN`` the score is stored; behind it, it depends on more."""

    LRU = 0
    FIFO = 1
    LFU = 2
    LFU_INCACHE = 3
    FIXED = 4
    MAP_FREQUENCY = 5
    MIN = 6
    SLRU = 7
    LFU_DECAY = 8
    LFRU = 9
    LEAST_STALE = 10
    RANDOM = 11


class Wish(IntEnum):
    """Prefetch seats."""

    NONE = 0
    PREVIOUS = 1
    AHEAD = 2
    HOT = 3
    FUTURE = 4
    WHOLE = 5
    FORECAST = 6


class See(IntEnum):
    """What the core comes to of forecasts."""

    GATE = 0
    PLANNED = 1
    """The gate's plan takes effect."""
    FACT = 2
    """Between layer events; where its record begins."""
    JOB = 3
    """Which host worker has done one."""


class Shelf(IntEnum):
    """What the core tells and asks of host memory; about which key."""

    WAKE = 0
    TURN = 1
    """The drive's pending event happens."""
    PIN = 2
    UNPIN = 3
    FETCH = 4
    """Demand, of the link."""
    HOST = 5
    """Demand, of a host worker."""


class G(_Rows):
    """The head of a record of what a fact foresees; then its forecasts. Each has a head ``H``, the
    chosen local ids, and the probabilities of all experts of the layer."""

    IS_TAKEN = auto()
    """Whether the row of ``M.jobs`` is in use."""
    BASE = auto()
    """The newest layer event when it was commissioned."""
    LENGTH = auto()
    """Of the record."""
    NS = auto()
    """What the work takes on a host worker."""
    PHASE = auto()
    COUNT = auto()
    """How many forecasts follow."""
    OPS = auto()
    BYTES = auto()
    KEPT_OPS = auto()
    KEPT_BYTES = auto()
    """Of its work, that which later forecasts build upon."""


class H(_Rows):
    """The head of a forecast."""

    EVENTS = auto()
    """How many layer events lie between the newest one and the one that it is about."""
    LAYER = auto()
    CHOSEN = auto()
    """How many experts are chosen."""


class Does(IntEnum):
    """What the compute lane's pending event is."""

    STEP = 0
    DENSE = 1
    GATE = 2
    PLANNED = 3
    BARRIER = 4
    HIT = 5
    ARRIVAL = 6
    STALLED = 7
    CPU = 8
    HEAD = 9
    IDLE = 10
    ENDED = 11
    BEGIN = 12
    """A device's lane: its part of a layer event."""
    JOINED = 13
    """The last device has computed."""
    EXCHANGED = 14


class Part(IntEnum):
    """What a device is asked to do: with a key, or with its own number."""

    GRANT = 0
    SENT = 1
    COMPUTE = 2
    GATE = 3
    PROMOTE = 4
    REORDER = 5
    FETCH = 6
    BEGIN = 7
    CPU_DONE = 8
    WAKE = 9
    WISH = 10
    CANCEL = 11
    REPRIORITISE = 12


class Order(IntEnum):
    """How the residents of a cache are kept."""

    SCAN = 0
    """In no order: the victim is searched among all."""
    LIST = 1
    """In a list by score: for scores that a touch raises above all others."""
    HEAP = 2
    """In heaps by (rank, key), where a score has a rank that only its own expert's touches change,
    or that all of a heap change alike."""


class Back(IntEnum):
    """What happens to copies that leave the device (``Options.write_back``)."""

    NOTHING = 0
    DUPLEX = 1
    SERIAL = 2


class Ask(IntEnum):
    """What the core asks the host of a policy in plain Python."""

    ROUTE = 0
    GATE = 1
    APPLY = 2
    """What the gate's plan asks for."""
    CHOOSE = 3
    LESSER = 4
    JOB_BEGIN = 5
    JOB_DONE = 6
    NOTES = 7


class P(_Rows):
    """Columns of a command, the form in which a plan in Python reaches the core."""

    DOES = auto()
    KEY = auto()
    EXPIRES = auto()
    PRIORITY = auto()
    REPLACES = auto()
    ORDINAL = auto()


class Command(IntEnum):
    """What a command does."""

    CANCEL = 0
    REPRIORITISE = 1
    PREFETCH = 2
    JOB = 3


class R(_Rows):
    """Columns of a note."""

    KIND = auto()
    KEY = auto()
    EVENT = auto()
    ORDINAL = auto()
    DEMAND = auto()


class Heard(IntEnum):
    """Kinds of note."""

    LANDED = 0
    EVICTED = 1
    DROPPED = 2
