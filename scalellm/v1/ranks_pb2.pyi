from scalellm.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RankPlan(_message.Message):
    __slots__ = ("meeting", "step", "masks", "copies", "swap", "capture", "seal")
    MEETING_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MASKS_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    SWAP_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    meeting: RankMeeting
    step: RankStep
    masks: RankMasks
    copies: BlockPairs
    swap: RankSwap
    capture: RankCapture
    seal: RankSeal
    def __init__(self, meeting: _Optional[_Union[RankMeeting, _Mapping]] = ..., step: _Optional[_Union[RankStep, _Mapping]] = ..., masks: _Optional[_Union[RankMasks, _Mapping]] = ..., copies: _Optional[_Union[BlockPairs, _Mapping]] = ..., swap: _Optional[_Union[RankSwap, _Mapping]] = ..., capture: _Optional[_Union[RankCapture, _Mapping]] = ..., seal: _Optional[_Union[RankSeal, _Mapping]] = ...) -> None: ...

class RankMeeting(_message.Message):
    __slots__ = ("host", "port", "generation", "device")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    generation: str
    device: str
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ..., generation: _Optional[str] = ..., device: _Optional[str] = ...) -> None: ...

class RankStep(_message.Message):
    __slots__ = ("step", "num_decodes", "rows", "starts", "num_tokens", "flags", "first_new_blocks", "block_counts", "blocks", "token_counts", "token_ids", "new_sequences", "scores", "masked", "drafts")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    FIRST_NEW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_COUNTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NEW_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    step: int
    num_decodes: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    num_tokens: _containers.RepeatedScalarFieldContainer[int]
    flags: _containers.RepeatedScalarFieldContainer[int]
    first_new_blocks: _containers.RepeatedScalarFieldContainer[int]
    block_counts: _containers.RepeatedScalarFieldContainer[int]
    blocks: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    new_sequences: _containers.RepeatedCompositeFieldContainer[RankSequence]
    scores: _containers.RepeatedCompositeFieldContainer[RankScore]
    masked: bool
    drafts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., num_decodes: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., num_tokens: _Optional[_Iterable[int]] = ..., flags: _Optional[_Iterable[int]] = ..., first_new_blocks: _Optional[_Iterable[int]] = ..., block_counts: _Optional[_Iterable[int]] = ..., blocks: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., new_sequences: _Optional[_Iterable[_Union[RankSequence, _Mapping]]] = ..., scores: _Optional[_Iterable[_Union[RankScore, _Mapping]]] = ..., masked: _Optional[bool] = ..., drafts: _Optional[_Iterable[int]] = ...) -> None: ...

class RankSequence(_message.Message):
    __slots__ = ("seed", "index", "num_prompt_tokens", "sampling", "has_grammar")
    SEED_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    HAS_GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    seed: int
    index: int
    num_prompt_tokens: int
    sampling: _common_pb2.SamplingParams
    has_grammar: bool
    def __init__(self, seed: _Optional[int] = ..., index: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., has_grammar: _Optional[bool] = ...) -> None: ...

class RankScore(_message.Message):
    __slots__ = ("place", "first", "count")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    place: int
    first: int
    count: int
    def __init__(self, place: _Optional[int] = ..., first: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class RankMasks(_message.Message):
    __slots__ = ("places", "rows")
    PLACES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedScalarFieldContainer[int]
    rows: bytes
    def __init__(self, places: _Optional[_Iterable[int]] = ..., rows: _Optional[bytes] = ...) -> None: ...

class BlockPairs(_message.Message):
    __slots__ = ("sources", "targets")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedScalarFieldContainer[int]
    targets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sources: _Optional[_Iterable[int]] = ..., targets: _Optional[_Iterable[int]] = ...) -> None: ...

class RankSwap(_message.Message):
    __slots__ = ("outs", "ins")
    OUTS_FIELD_NUMBER: _ClassVar[int]
    INS_FIELD_NUMBER: _ClassVar[int]
    outs: BlockPairs
    ins: BlockPairs
    def __init__(self, outs: _Optional[_Union[BlockPairs, _Mapping]] = ..., ins: _Optional[_Union[BlockPairs, _Mapping]] = ...) -> None: ...

class RankCapture(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankSeal(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeMessage(_message.Message):
    __slots__ = ("challenge", "hello", "welcome", "refusal", "start", "beat", "end")
    CHALLENGE_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    challenge: NodeChallenge
    hello: NodeHello
    welcome: NodeWelcome
    refusal: NodeRefusal
    start: NodeStart
    beat: NodeBeat
    end: NodeEnd
    def __init__(self, challenge: _Optional[_Union[NodeChallenge, _Mapping]] = ..., hello: _Optional[_Union[NodeHello, _Mapping]] = ..., welcome: _Optional[_Union[NodeWelcome, _Mapping]] = ..., refusal: _Optional[_Union[NodeRefusal, _Mapping]] = ..., start: _Optional[_Union[NodeStart, _Mapping]] = ..., beat: _Optional[_Union[NodeBeat, _Mapping]] = ..., end: _Optional[_Union[NodeEnd, _Mapping]] = ...) -> None: ...

class NodeChallenge(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("node_rank", "nonce", "proof", "facts", "generation", "rank")
    class FactsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    node_rank: int
    nonce: bytes
    proof: bytes
    facts: _containers.ScalarMap[str, str]
    generation: str
    rank: int
    def __init__(self, node_rank: _Optional[int] = ..., nonce: _Optional[bytes] = ..., proof: _Optional[bytes] = ..., facts: _Optional[_Mapping[str, str]] = ..., generation: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class NodeWelcome(_message.Message):
    __slots__ = ("proof",)
    PROOF_FIELD_NUMBER: _ClassVar[int]
    proof: bytes
    def __init__(self, proof: _Optional[bytes] = ...) -> None: ...

class NodeRefusal(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class NodeStart(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: str
    def __init__(self, generation: _Optional[str] = ...) -> None: ...

class NodeBeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeEnd(_message.Message):
    __slots__ = ("reason", "stalled")
    REASON_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    reason: str
    stalled: bool
    def __init__(self, reason: _Optional[str] = ..., stalled: _Optional[bool] = ...) -> None: ...
