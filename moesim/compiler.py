"""How numba compiles the core: small functions that are parts, and few that Python calls.

numba links each function with all that it calls, optimises that and makes machine code of it; the
result goes into the next caller, and so on: in a core of many small functions the same code is
optimised again at every level. Here a *part* stays as it was lowered. What Python calls is linked
with all its parts, and optimised once.

numba also passes a named tuple of arrays as all of their fields: a hundred arguments and more at
every call. Here parts get the tuple's address; once they are inlined nothing of that is left.

Half of the time went into finding types: to numba each named row and each constant is a type of its
own, and each operator asks dozens of templates. Here whole numbers are int64, arrays whose indices
are never negative are read without a test for that, and what an operator makes of these is found
once.

What few runs need is a whole of its own, which others call by its address. It may not see the
tuple that its caller keeps in registers, or that would be one no more; so there are two copies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import EnumMeta
from typing import Any, TypeVar

import numba
from llvmlite import ir as llvm
from numba import _dynfunc, types  # type: ignore[attr-defined]
from numba.core import cgutils, ir
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import FunctionPass, PassManager, register_pass
from numba.core.datamodel import models
from numba.core.registry import cpu_target
from numba.core.typed_passes import NativeLowering
from numba.core.typing.templates import (
    AbstractTemplate,
    AttributeTemplate,
    infer_global,
    signature,
)
from numba.core.untyped_passes import FixupArgs
from numba.extending import (
    infer_getattr,
    intrinsic,
    lower_builtin,
    lower_getattr_generic,
    register_model,
)

C = TypeVar("C")

# ---- a tuple by its address ----------------------------------------------------------------------


class Place(types.Type):
    """Where a named tuple lies."""

    def __init__(self, whole: Any) -> None:
        super().__init__(f"Place({whole})")
        self.whole = whole


@register_model(Place)
class PlaceModel(models.PrimitiveModel):
    """A pointer to the tuple's value."""

    def __init__(self, manager: Any, place: Place) -> None:
        value = manager.lookup(place.whole).get_value_type()
        super().__init__(manager, place, value.as_pointer())


class Held(types.Type):
    """A named tuple whose fields lie in the frame of what Python called."""

    def __init__(self, whole: Any) -> None:
        super().__init__(f"Held({whole})")
        self.whole = whole


@register_model(Held)
class HeldModel(models.StructModel):
    """Two copies: one for what is inlined, which becomes mere registers, and one whose address may
    be given away."""

    def __init__(self, manager: Any, held: Held) -> None:
        place = Place(held.whole)
        super().__init__(manager, held, [("near", place), ("far", place)])


@infer_getattr
class HeldFields(AttributeTemplate):
    """Its fields have the tuple's types."""

    key = Held

    def generic_resolve(self, value: Any, attr: Any) -> Any:  # type: ignore[override]
        """The type of a field; None if there is none of that name."""
        fields = value.whole.fields
        if attr not in fields:
            return None
        kind = value.whole.types[fields.index(attr)]
        return Cells(kind) if _is_cells(value.whole, kind) else kind


@lower_getattr_generic(Held)
def _field(context: Any, builder: Any, held: Held, value: Any, name: str) -> Any:
    field = held.whole.fields.index(name)
    near = context.make_helper(builder, held, value).near
    place = cgutils.gep_inbounds(builder, near, 0, field)
    return place if _is_cells(held.whole, held.whole.types[field]) else builder.load(place)


@intrinsic
def hold(typing_context: Any, whole: Any) -> Any:
    """Put a tuple in the caller's frame."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        far = cgutils.alloca_once_value(builder, values[0])
        return _holding(context, builder, signature.return_type, values[0], far)

    return Held(whole)(whole), generate


@intrinsic
def held_at(typing_context: Any, address: Any, whole: Any) -> Any:
    """A tuple that a caller holds, by the address that ``call_with`` passed."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        held = signature.return_type
        place = context.get_value_type(Place(held.whole))
        far = builder.inttoptr(values[0], place)
        return _holding(context, builder, held, builder.load(far), far)

    return Held(whole.instance_type)(address, whole), generate


def _holding(context: Any, builder: Any, held: Any, value: Any, far: Any) -> Any:
    both = context.make_helper(builder, held)
    both.near, both.far = cgutils.alloca_once_value(builder, value), far
    return both._getvalue()


@intrinsic
def call_with(typing_context: Any, function: Any, held: Any, what: Any, about: Any) -> Any:
    """Call an ``outside`` function by its address."""
    number = types.int64

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        i64 = context.get_value_type(number)
        kind = llvm.FunctionType(i64, [i64] * 3).as_pointer()
        far = context.make_helper(builder, held, values[1]).far
        called = builder.inttoptr(values[0], kind)
        return builder.call(called, [builder.ptrtoint(far, i64), *values[2:]])

    return number(number, held, number, number), generate


@intrinsic
def lay_at(typing_context: Any, address: Any, held: Any) -> Any:
    """Copy a held tuple to an address, where ``held_at`` finds it; how many bytes it takes."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        far = context.make_helper(builder, held, values[1]).far
        place = builder.inttoptr(values[0], far.type)
        builder.store(builder.load(far), place)
        nbytes = context.get_abi_sizeof(far.type.pointee)
        return context.get_constant(types.int64, nbytes)

    return types.int64(address, held), generate


@register_pass(mutates_CFG=False, analysis_only=False)
class HoldTuples(FunctionPass):
    """``m = hold(m)`` in front of everything, for each argument that is a named tuple."""

    _name = "hold_tuples"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        """Rewrite the first block."""
        blocks = state.func_ir.blocks
        block = blocks[min(blocks)]
        body: list[Any] = []
        for line in block.body:
            body.append(line)
            given = getattr(line, "value", None)
            if isinstance(given, ir.Arg) and isinstance(state.args[given.index], types.NamedTuple):
                body[-1:] = _held(line, block.scope)
        block.body[:] = body
        return True


def _held(line: Any, scope: Any) -> list[Any]:
    whole, function = (scope.redefine(f"${n}", line.loc) for n in ("whole", "hold"))
    state = ir.Expr.call(function, (whole,), (), line.loc)
    return [
        ir.Assign(line.value, whole, line.loc),
        ir.Assign(ir.Global("hold", hold, line.loc), function, line.loc),
        ir.Assign(state, line.target, line.loc),
    ]


# ---- an array whose indices are at least 0 -------------------------------------------------------


class Cells(types.Type):
    """A contiguous array of a held tuple, none of whose indices count from its end: numba would
    test each for that, which is most of the code of a read."""

    def __init__(self, array: Any) -> None:
        super().__init__(f"Cells({array})")
        self.array = array

    def is_place(self, index: Any) -> bool:
        """Whether an index names one element."""
        several: Any = index if isinstance(index, types.BaseTuple) else (index,)
        kinds = tuple(several)
        return len(kinds) == self.array.ndim and all(isinstance(k, types.Integer) for k in kinds)


_from_zero: set[type] = set()


def from_zero(tuples: type[C]) -> type[C]:
    """Promise that no index into the arrays of a named tuple is below 0."""
    _from_zero.add(tuples)
    return tuples


def _is_cells(whole: Any, kind: Any) -> bool:
    """Whether that is promised; what is to be checked stays an array."""
    config: Any = numba.config
    promised = whole.instance_class in _from_zero and not config.BOUNDSCHECK
    return promised and kind.ndim <= 2 and kind.layout == "C"


@register_model(Cells)
class CellsModel(models.PrimitiveModel):
    """A pointer to the array's value."""

    def __init__(self, manager: Any, cells: Cells) -> None:
        value = manager.lookup(cells.array).get_value_type()
        super().__init__(manager, cells, value.as_pointer())


@infer_global(operator.getitem)
class CellsRead(AbstractTemplate):
    """An element, or a slice as of any array."""

    def generic(self, args: Any, kws: Any) -> Any:
        """The signature; None if it is about something else."""
        cells, index = args
        if not isinstance(cells, Cells):
            return None
        if cells.is_place(index):
            return signature(cells.array.dtype, cells, index)
        whole = self.context.resolve_function_type(operator.getitem, (cells.array, index), {})
        return signature(whole.return_type, cells, whole.args[1])


@infer_global(operator.setitem)
class CellsWrite(AbstractTemplate):
    """An element."""

    def generic(self, args: Any, kws: Any) -> Any:
        """The signature; None if it is about something else."""
        cells, index, _ = args
        if isinstance(cells, Cells) and cells.is_place(index):
            return signature(types.void, cells, index, cells.array.dtype)
        return None


@infer_global(len)
class CellsLength(AbstractTemplate):
    """How many rows."""

    def generic(self, args: Any, kws: Any) -> Any:
        """The signature; None if it is about something else."""
        return signature(types.int64, *args) if isinstance(args[0], Cells) else None


@lower_builtin(operator.getitem, Cells, types.Any)
def _read(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    cells, index = sig.args
    if cells.is_place(index):
        return builder.load(_place(context, builder, sig.args, args))
    known = signature(sig.return_type, cells.array, index)
    function = context.typing_context.resolve_value_type(operator.getitem)
    function.get_call_type(context.typing_context, known.args, {})
    slices = context.get_function(function, known)
    return slices(builder, (builder.load(args[0]), args[1]))


@lower_builtin(operator.setitem, Cells, types.Any, types.Any)
def _write(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    builder.store(args[2], _place(context, builder, sig.args, args))
    return context.get_dummy_value()


@lower_builtin(len, Cells)
def _length(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    return _extent(context, builder, sig.args[0], args[0], 0)


def _place(context: Any, builder: Any, kinds: Any, values: Any) -> Any:
    """The address of an element."""
    cells, index = kinds[:2]
    several = isinstance(index, types.BaseTuple)
    each: Any = index.types if several else (index,)
    given: Any = cgutils.unpack_tuple(builder, values[1]) if several else (values[1],)
    of = [context.cast(builder, v, k, types.int64) for v, k in zip(given, each, strict=True)]
    at = of[0]
    for axis in range(1, len(of)):
        extent = _extent(context, builder, cells, values[0], axis)
        at = builder.add(builder.mul(at, extent), of[axis])
    array = context.make_helper(builder, cells.array, ref=values[0])
    return builder.gep(array.data, [at], inbounds=True)


def _extent(context: Any, builder: Any, cells: Any, address: Any, axis: int) -> Any:
    array = context.make_helper(builder, cells.array, ref=address)
    return builder.extract_value(array.shape, axis)


# ---- types, found once ---------------------------------------------------------------------------


@register_pass(mutates_CFG=False, analysis_only=False)
class PlainNumbers(FunctionPass):
    """Names of rows and other whole numbers become int64: to numba each is a type of its own."""

    _name = "plain_numbers"

    def __init__(self) -> None:
        FunctionPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        """Rewrite every block."""
        for block in state.func_ir.blocks.values():
            block.body[:] = _plain_numbers(block.body)
        return True


def _plain_numbers(lines: list[Any]) -> list[Any]:
    enums: dict[str, int] = {}
    body: list[Any] = []
    for line in lines:
        body.append(line)
        value = getattr(line, "value", None) if isinstance(line, ir.Assign) else None
        if isinstance(value, ir.Global | ir.FreeVar) and isinstance(value.value, EnumMeta):
            enums[line.target.name] = len(body) - 1
        elif isinstance(value, ir.Expr) and value.op == "getattr" and value.value.name in enums:
            # What the name of the class was loaded for is this alone.
            place = enums.pop(value.value.name)
            members = body[place].value.value
            body[place] = None
            line.value = _number(members[value.attr], line.loc)
        elif isinstance(value, ir.Global | ir.FreeVar | ir.Const) and type(value.value) is int:
            line.value = _number(value.value, line.loc)
    return [line for line in body if line is not None]


def _number(value: int, loc: Any) -> Any:
    return ir.Const(int(value), loc, use_literal_type=False)


COMMON = (
    *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg),
    *(operator.iadd, operator.isub, operator.imul, operator.ixor),
    *(operator.lshift, operator.rshift, operator.and_, operator.or_, operator.xor),
    *(operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne, operator.not_),
    *(operator.getitem, operator.setitem, bool, len, range, min, max, int),
)
"""What most of the core is made of."""


@contextmanager
def remembering() -> Iterator[None]:
    """Find once what one of these makes of numbers and cells: numba asks some dozens of templates
    each time."""
    context: Any = cpu_target.typing_context
    with global_compiler_lock:
        context.refresh()
        functions = [context.resolve_value_type(one) for one in COMMON]
        for function in functions:
            function.get_call_type = _remembered(function.get_call_type)
        try:
            yield
        finally:
            for function in functions:
                del function.get_call_type


def _remembered(find: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def get_call_type(context: Any, args: Any, kws: Any) -> Any:
        if kws or not all(isinstance(kind, SIMPLE) for kind in args):
            return find(context, args, kws)
        if args not in known:
            known[args] = find(context, args, kws)
        return known[args]

    return get_call_type


SIMPLE = types.Integer, types.Boolean, types.UniTuple, Cells


# ---- parts, and the whole ------------------------------------------------------------------------


class Part(JITCodeLibrary):
    """The lowered code of one function, to be linked into others."""

    def add_llvm_module(self, module: Any) -> None:
        """Tidy what is defined there, which is little work here and much in every caller."""
        module.data_layout = self._codegen._data_layout
        for function in module.functions:
            if not function.is_declaration:
                passes, builder = self._codegen._function_pass_manager()
                passes.run(function, builder)
        self._final_module.link_in(module)

    def finalize(self) -> None:
        """Nothing is linked in, optimised or made machine code of."""
        self._finalize_dynamic_globals()
        self._finalized = True

    def with_parts(self) -> list[Any]:
        """Itself and all that is to be linked with it."""
        return list(dict.fromkeys([self, *self._linking_libraries]))


class Whole(JITCodeLibrary):
    """What Python calls, linked with all its parts."""

    def _optimize_final_module(self) -> None:
        passes, builder = self._codegen._module_pass_manager()
        passes.run(self._final_module, builder)


@register_pass(mutates_CFG=True, analysis_only=False)
class PartLowering(NativeLowering):
    """Lowers a function into a ``Part``."""

    _name = "part_lowering"

    def run_pass(self, state: Any) -> bool:
        """Lower; then callers may find it."""
        name = state.func_id.func_qualname
        state.library = Part(state.targetctx.codegen(), name)
        state.flags.no_compile = True
        super().run_pass(state)
        lowered, library = state["cr"], state.library
        library.finalize()
        # Never called: callers find the function by it.
        token = _dynfunc.make_function(
            lowered.fndesc.lookup_module(), name, "", 0, lowered.env, (library,)
        )
        state.targetctx.insert_user_function(token, lowered.fndesc, library.with_parts())
        state["cr"] = lowered._replace(cfunc=token)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class WholeLowering(NativeLowering):
    """Lowers a function into a ``Whole``."""

    _name = "whole_lowering"

    def run_pass(self, state: Any) -> bool:
        """Lower, link, optimise, make machine code."""
        state.library = Whole(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return bool(super().run_pass(state))


NEEDLESS = frozenset(
    (
        *("WithLifting", "InlineClosureLikes", "MakeFunctionToJitFunction", "InlineInlinables"),
        *("DeadBranchPrune", "FindLiterallyCalls", "LiteralUnroll", "RewriteDynamicRaises"),
        *("LiteralPropagationSubPipelinePass", "InlineOverloads", "DumpParforDiagnostics"),
    )
)
"""numba's passes for what the core has not: closures, ``with``, literal arguments, exceptions."""


class PartCompiler(CompilerBase):
    """numba's pipeline for a part."""

    lowering: type = PartLowering

    def define_pipelines(self) -> list[Any]:
        """One way to compile."""
        passes = PassManager(type(self).__name__)
        for one, what in DefaultPassBuilder.define_nopython_pipeline(self.state).passes:
            if one.__name__ in NEEDLESS:
                continue
            passes.add_pass(self.lowering if one is NativeLowering else one, what)
            if one is FixupArgs:
                passes.add_pass(HoldTuples, "hold tuples")
                passes.add_pass(PlainNumbers, "plain numbers")
        passes.finalize()
        return [passes]


class WholeCompiler(PartCompiler):
    """numba's pipeline for what Python calls."""

    lowering = WholeLowering
