"""Records the quick engine's logs: traces of a model whose dimensions are told apart by a prime factor of each.

The number of bytes of a piece of memory then says of which dimensions it is the product.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from trainkit.memory.device_look import cuda_scratch
from trainkit.memory.event_log import TRACED, Kind
from trainkit.memory.fake_model import FakeModel, fake_model
from trainkit.memory.families import FAMILIES, Family, Shape, recorded_config
from trainkit.memory.four_bit import FourBitLinear
from trainkit.memory.scenario import Scenario
from trainkit.memory.symbolic_log import Dimensions, ParameterCount, SymbolicLog
from trainkit.memory.trace import step_log
from trainkit.recipe.schema import Adapter

if TYPE_CHECKING:
    from trainkit.memory.event_log import EventLog
    from trainkit.memory.quick import LogKey

_TAGS = Dimensions(
    rows=37,
    tokens=41,
    key_value_heads=43,
    queries_per_key=107,
    hidden=53,
    intermediate=59,
    head_width=31,
    vocabulary=67,
    rank=71,
    chunk=61,
    last_chunk=127,
    fused_heads=109,
    positions=1009,
)
# Factors of two let heads be as wide as kernels want, and packed weights fill whole blocks.
_ROWS, _TOKENS, _CHUNK = 37, 41 * 128, 61 * 1000
_SEVERAL_ROWS = Dimensions(
    rows=_ROWS,
    tokens=_TOKENS,
    key_value_heads=43 * 16,
    queries_per_key=107,
    hidden=53 * 2048 * 43 * 107,  # a multiple of the heads, which config classes ask for; so it is looked for first
    intermediate=59 * 2048,
    head_width=31 * 8,
    vocabulary=67 * 2048,
    rank=71,
    chunk=_CHUNK,
    last_chunk=_ROWS * _TOKENS - 3 * _CHUNK,
    fused_heads=107 + 2,
    positions=1009 * 256,  # more than the tokens of a row
)
_ONE_ROW = _SEVERAL_ROWS._replace(rows=1, tokens=_ROWS * _TOKENS)
_ONE_KEY_HEAD = {"key_value_heads": 1, "queries_per_key": 107 * 16}
_SMALL_BYTES = 2**16  # what is no product of dimensions and smaller than this counts as a constant
_HALF = 2  # of a head's width, as rotations have it
_SCRATCH_MARK = 2**60


def record(key: LogKey) -> SymbolicLog:
    """Trace the step that ``key`` names. Raises ValueError where a size is no product of dimensions."""
    calls: list[tuple[str, tuple[int, ...]]] = []

    def marked(func: Any, args: tuple[Any, ...]) -> int:
        call = cuda_scratch(func, args)
        if call is None:
            return 0
        if call not in calls:
            calls.append(call)
        return _SCRATCH_MARK + calls.index(call)

    scenario = scenario_to_record(key)
    model = fake_model(scenario, full_depth=True, period=_family_of(key).period)
    numbers = _numbers(model, key.file.left_over)
    chunk_tokens = scenario.tokens if key.one_chunk else _CHUNK
    return _decoded(
        step_log(scenario, model, chunk_tokens=chunk_tokens, scratch_bytes=marked), calls, numbers, dimensions_of(key)
    )


def dimensions_of(key: LogKey) -> Dimensions:
    """The dimensions that are recorded, each of which has a prime factor of its own unless it is 1."""
    dimensions = _ONE_ROW if key.one_row else _SEVERAL_ROWS
    return dimensions._replace(**_ONE_KEY_HEAD) if _family_of(key).one_key_head else dimensions


def _family_of(key: LogKey) -> Family:
    return next(family for family in FAMILIES if family.name == key.file.family)


def scenario_to_record(key: LogKey) -> Scenario:
    """A step of four units of layers and, unless it is in one, four chunks, of which the last is the shortest."""
    dimensions = dimensions_of(key)
    family = _family_of(key)
    heads = dimensions.key_value_heads * dimensions.queries_per_key
    shape = Shape(
        layers=TRACED * family.period + key.file.left_over,
        hidden=dimensions.hidden if family.free_width else heads * dimensions.head_width,
        intermediate=dimensions.intermediate,
        heads=heads,
        key_value_heads=dimensions.key_value_heads,
        head_width=dimensions.head_width,
        vocabulary=dimensions.vocabulary,
        positions=dimensions.positions,
    )
    return Scenario(
        config=recorded_config(family, shape, tied=key.file.tied),
        sequence_length=dimensions.tokens,
        micro_batch_size=dimensions.rows,
        micro_batches=2 if key.accumulates else 1,
        adapter=None if key.file.method == "full" else Adapter(type=key.file.method, r=dimensions.rank),
        activation_checkpointing=key.checkpointed,
    )


def _numbers(model: FakeModel, left_over: int) -> Counter[tuple[int, bool, bool, bool]]:
    """How many parameters there are of each (numbers, within whole units of layers, trains, added by the adapter)."""
    packed = {
        id(module.weight): module.in_features * module.out_features
        for module in model.model.modules()
        if isinstance(module, FourBitLinear)
    }
    in_layers = {id(parameter) for layer in model.layers[left_over:] for parameter in layer.parameters()}
    return Counter(
        (
            packed.get(id(parameter), parameter.numel()),
            id(parameter) in in_layers,
            parameter.requires_grad,
            "lora_" in name,
        )
        for name, parameter in model.model.named_parameters()
    )


def _decoded(
    log: EventLog,
    calls: list[tuple[str, tuple[int, ...]]],
    numbers: Counter[tuple[int, bool, bool, bool]],
    dimensions: Dimensions,
) -> SymbolicLog:
    sizes: dict[tuple[int, ...], int] = {}

    def index(number: int) -> int:
        return sizes.setdefault(_factors(number, dimensions), len(sizes))

    allocations = [allocation._replace(size=index(log.sizes[allocation.size])) for allocation in log.allocations]
    events = [
        event._replace(subject=log.sizes[event.subject] - _SCRATCH_MARK) if event.kind == Kind.SCRATCH else event
        for event in log.events
    ]
    scratch = [(name, [index(number) for number in numbers]) for name, numbers in calls]
    parameters = [
        ParameterCount(index(size), count // TRACED * inside, count * (not inside), trains, added)
        for (size, inside, trains, added), count in sorted(numbers.items())
    ]
    return SymbolicLog(list(sizes), scratch, allocations, events, log.moments, parameters)


def _factors(number: int, dimensions: Dimensions) -> tuple[int, ...]:
    """Numerator, denominator and the exponent of each dimension."""
    rest, exponents = Fraction(number), dict.fromkeys(Dimensions._fields, 0)
    for name in ("hidden", "tokens", *Dimensions._fields):
        recorded = getattr(dimensions, name)
        while number and recorded > 1 and rest.numerator % getattr(_TAGS, name) == 0:
            rest /= recorded
            exponents[name] += 1
    # A small number that has the prime of a dimension by accident is told by how little of that dimension it is.
    accident = number < _SMALL_BYTES and rest.denominator > _HALF
    if _is_plain(rest) and not accident:
        return rest.numerator, rest.denominator, *exponents.values()
    if number < _SMALL_BYTES:
        return number, 1, *(0 for _ in exponents)
    raise ValueError(f"{number} bytes are no product of dimensions: {rest} is left")


def _is_plain(rest: Fraction) -> bool:
    """Whether what is left is made of the factors of byte counts and of gates: 2, 3 and 5; below the line, of 2."""
    left = rest.numerator
    for prime in (2, 3, 5):
        while left and left % prime == 0:
            left //= prime
    return left in {0, 1} and rest.denominator.bit_count() == 1
