"""How numba compiles the core: small functions that are parts, and few that Python calls.

numba links each function with all that it calls, optimises that and makes machine code of it; the
result goes into the next caller, and so on: in a core of many small functions the same code is
optimised again at every level. Here a *part* stays as it was lowered. What Python calls is linked
with all its parts, and optimised once.

numba also passes a named tuple of arrays as all of their fields: a hundred arguments and more at
every call. Here parts get the tuple's address; once they are inlined nothing of that is left.
"""

from __future__ import annotations

from typing import Any

from numba import _dynfunc, types  # type: ignore[attr-defined]
from numba.core import cgutils, ir
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import FunctionPass, PassManager, register_pass
from numba.core.datamodel import models
from numba.core.typed_passes import NativeLowering
from numba.core.typing.templates import AttributeTemplate
from numba.core.untyped_passes import FixupArgs
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, register_model

# ---- a tuple by its address ----------------------------------------------------------------------


class Held(types.Type):
    """A named tuple whose fields lie in the frame of what Python called."""

    def __init__(self, whole: Any) -> None:
        super().__init__(f"Held({whole})")
        self.whole = whole


@register_model(Held)
class HeldModel(models.PrimitiveModel):
    """A pointer to the tuple's value."""

    def __init__(self, manager: Any, held: Held) -> None:
        value = manager.lookup(held.whole).get_value_type()
        super().__init__(manager, held, value.as_pointer())


@infer_getattr
class HeldFields(AttributeTemplate):
    """Its fields have the tuple's types."""

    key = Held

    def generic_resolve(self, value: Any, attr: Any) -> Any:  # type: ignore[override]
        """The type of a field; None if there is none of that name."""
        fields = value.whole.fields
        return value.whole.types[fields.index(attr)] if attr in fields else None


@lower_getattr_generic(Held)
def _field(context: Any, builder: Any, held: Held, address: Any, name: str) -> Any:
    place = cgutils.gep_inbounds(builder, address, 0, held.whole.fields.index(name))
    return builder.load(place)


@intrinsic
def hold(typing_context: Any, whole: Any) -> Any:
    """Put a tuple in the caller's frame; its address."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return cgutils.alloca_once_value(builder, values[0])

    return Held(whole)(whole), generate


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
        passes.finalize()
        return [passes]


class WholeCompiler(PartCompiler):
    """numba's pipeline for what Python calls."""

    lowering = WholeLowering
