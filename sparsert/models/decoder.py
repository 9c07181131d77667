"""One decoder forward for all supported architectures.

What tells families apart stands in the configuration (:mod:`sparsert.models.families`); here is a chain of
layers, attention and feed-forward in turn. Each is behind a norm; its output projection and the addition to
the residual stream are left to the norm that follows, because projection, addition and norm can be one kernel.
A layer that the configuration lacks or the layer plan skips is not there: no module, no memory, no norm, no
place in a cache.

    pending --norm--> stream, normed --layer--> pending --norm--> ... --final norm--> head

Nothing here looks at a tensor's values on the host or lets a shape depend on them, which is what CUDA graphs
ask for. Numbers follow transformers: norms in fp32, rotary tables in fp32 and rounded, soft caps and the softmax
in fp32. On a GPU the kernels behind :mod:`sparsert.ops` keep sums in fp32 where transformers rounds in between.

Source: Touvron et al., "LLaMA" (2023); the modeling files of transformers.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsert import ops
from sparsert.errors import InputError
from sparsert.models.attention import Attention, CausalAttention, SelfAttention
from sparsert.models.config import DecoderConfig, LinearShape, MLPConfig, NormConfig
from sparsert.models.linears import DenseLinear, LinearGroup, meta_linear, takes_tiles
from sparsert.models.report import LoadReport
from sparsert.models.rope import RotaryEmbedding
from sparsert.nn import SparseLinear
from sparsert.schedule import LayerPlan, format_block_list

#: Routes of other plans than the model's own that are remembered.
_ROUTES_KEPT = 64


class Norm(nn.Module):
    """The weights of a norm; the arithmetic is :func:`sparsert.ops.residual_norm`."""

    bias: nn.Parameter | None

    def __init__(self, width: int, config: NormConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(width, device="meta"), requires_grad=False) if config.centered else None
        self.eps = config.eps
        self.centered = config.centered

    def forward(
        self, pending: Pending, consumer: LinearGroup | None = None
    ) -> tuple[Tensor, Tensor | ops.DeferredNorm]:
        """Finish the last layer, add it to the residual stream, and norm the sum.

        Args:
            pending: of the last layer; taken, so that what it holds can go as soon as it has been used.
            consumer: what takes the result, if it can take one whose division is put off.

        Returns:
            (stream, normed), each ``[batch, tokens, hidden]``; normed is deferred only if ``consumer`` takes that.
        """
        x, stream = pending.take()
        layer, post_norm = pending.layer, pending.post_norm
        defers = not self.centered and self.bias is None and post_norm is None and stream is not None
        if defers and isinstance(layer, SparseLinear) and consumer is not None and consumer.takes_deferred(x):
            assert stream is not None
            return ops.linear24_close(
                x, layer.packed(), layer.bias, stream, self.weight, self.eps, backend=layer.backend
            )
        x = ops.to_rows(x)
        if layer is not None:
            x = layer(x)
        post_weight = post_norm.weight if post_norm is not None else None
        return ops.residual_norm(
            x, stream, self.weight, self.eps, bias=self.bias, post_weight=post_weight, centered=self.centered
        )


class Pending:
    """What is still to be added to the residual stream.

    Whoever calls a block holds its arguments until it returns, and the widest activations of a prompt with them; hence
    tensors that can be taken out.

    Attributes:
        layer: the output projection, still to be applied; None at the start.
        post_norm: norms what is added, or None.
    """

    __slots__ = ("_tensors", "layer", "post_norm")

    def __init__(
        self,
        x: Tensor | ops.Tiled,
        stream: Tensor | None = None,
        layer: nn.Module | None = None,
        post_norm: Norm | None = None,
    ) -> None:
        """Make one.

        Args:
            x: ``[batch, tokens, width]``, perhaps in tiles: input of the last layer's output projection.
            stream: the residual stream, ``[batch, tokens, hidden]``; None at the start, where x is the stream.
            layer, post_norm: see above.
        """
        self._tensors: tuple[Tensor | ops.Tiled, Tensor | None] | None = (x, stream)
        self.layer, self.post_norm = layer, post_norm

    def take(self) -> tuple[Tensor | ops.Tiled, Tensor | None]:
        """x and the stream, once."""
        assert self._tensors is not None, "taken before"
        tensors, self._tensors = self._tensors, None
        return tensors

    def at(self, rows: Tensor) -> Pending:
        """The same of some tokens only; takes what is here."""
        x, stream = self.take()
        picked = _pick(stream, rows) if stream is not None else None
        return Pending(_pick(ops.to_rows(x), rows), picked, self.layer, self.post_norm)


class MLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` where there is no gate.

    Attributes:
        gate_up_proj: gate and up as one layer; up alone where there is no gate.
        down_proj: the output projection.
    """

    def __init__(self, config: MLPConfig, linears: dict[str, LinearShape]) -> None:
        super().__init__()
        inner = ("gate_proj", "up_proj") if config.gated else ("up_proj",)
        self.activation, self.gated = config.activation, config.gated
        self.gate_up_proj = LinearGroup({name: linears[f"mlp.{name}"] for name in inner})
        self.down_proj: nn.Module = meta_linear(linears["mlp.down_proj"])

    def forward(self, x: Tensor | ops.DeferredNorm) -> Tensor | ops.Tiled:
        """``[..., hidden]`` -> ``[..., intermediate]``, the input of ``down_proj``, in tiles if it takes them."""
        like = x.weighted if isinstance(x, ops.DeferredNorm) else x
        tiled = takes_tiles(self.down_proj, like)
        return self.gate_up_proj.activated(x, self.activation, gated=self.gated, tiled=tiled)


class DecoderBlock(nn.Module):
    """Attention, then feed-forward; either may be missing.

    Attributes:
        index: of the block in the checkpoint.
        attention_norm, mlp_norm: in front of the layers.
        attention_post_norm, mlp_post_norm: of what they compute, where the model has them.
        self_attn, mlp: the layers.
    """

    attention_norm: Norm | None
    attention_post_norm: Norm | None
    self_attn: SelfAttention | None
    mlp_norm: Norm | None
    mlp_post_norm: Norm | None
    mlp: MLP | None

    def __init__(self, config: DecoderConfig, plan: LayerPlan, index: int, rotary: RotaryEmbedding | None) -> None:
        """Make a block without weights.

        Args:
            config: of the whole model.
            plan: what of it runs.
            index: of the block in the checkpoint.
            rotary: tables of the block's attention, None without.
        """
        super().__init__()
        self.index = index
        running, linears = config.running(index, plan), config.block_linears(index, plan)
        norms = config.block_norms(index, plan)
        for name in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"):
            setattr(self, name, Norm(norms[name], config.norm) if name in norms else None)
        self.self_attn = self.mlp = None
        if running.attention is not None and rotary is not None:
            self.self_attn = SelfAttention(running.attention, linears, rotary)
        if running.mlp is not None:
            self.mlp = MLP(running.mlp, linears)

    def forward(
        self, pending: Pending, attention: Attention, slot: int, *, runs_attention: bool = True, runs_mlp: bool = True
    ) -> Pending:
        """Run the block.

        Args:
            pending: of the layer before; taken.
            attention: see :class:`Attention`.
            slot: of the block's attention layer; without meaning if it has none.
            runs_attention, runs_mlp: leave out a layer that is there.

        Returns:
            What is pending now.
        """
        if runs_attention and self.self_attn is not None and self.attention_norm is not None:
            stream, normed = self.attention_norm(pending, self.self_attn.qkv_proj)
            attended = self.self_attn(normed, attention, slot)
            del normed
            pending = Pending(attended, stream, self.self_attn.o_proj, self.attention_post_norm)
        if runs_mlp and self.mlp is not None and self.mlp_norm is not None:
            stream, normed = self.mlp_norm(pending, self.mlp.gate_up_proj)
            pending = Pending(self.mlp(normed), stream, self.mlp.down_proj, self.mlp_post_norm)
        return pending


class _Stop(NamedTuple):
    """A block on the way of a plan."""

    block: DecoderBlock
    slot: int
    runs_attention: bool
    runs_mlp: bool


class DecoderModel(nn.Module):
    """A decoder whose layers are those that a layer plan keeps. Made by ``load_model``.

    Attributes:
        config: the architecture; ``config.num_blocks`` counts the checkpoint's blocks.
        plan: what of it is resident; ``len(blocks) == len(plan.kept)``.
        rotaries: tables of cosines and sines, one for each rope that the attention layers use.
        report: how each linear layer was loaded.
    """

    report: LoadReport

    def __init__(self, config: DecoderConfig, plan: LayerPlan) -> None:
        super().__init__()
        _check_blocks(plan, config)
        self.config = config
        self.plan = plan
        self.report = LoadReport({}, ())
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device="meta")
        tables = {kind: RotaryEmbedding(*kind) for kind in config.rope_tables(plan)}
        blocks = []
        for index in plan.kept:
            attention = config.running(index, plan).attention
            rotary = None if attention is None else tables[attention.rope, attention.shape.rotary_dim]
            blocks.append(DecoderBlock(config, plan, index, rotary))
        self.rotaries = nn.ModuleList(tables.values())
        self.blocks = nn.ModuleList(blocks)
        self.norm = Norm(config.hidden_size, config.norm)
        self.lm_head = DenseLinear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        self._routes: dict[LayerPlan, tuple[_Stop, ...]] = {}

    @property
    def attention_shapes(self) -> tuple[ops.AttentionShape, ...]:
        """What each resident attention layer computes, by slot."""
        return self.config.attention_shapes(self.plan)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """dtype of activations and values."""
        return self.embed_tokens.weight.dtype

    @property
    def rotary_tables(self) -> tuple[Tensor, ...]:
        """All tables of cosines and sines as they are now; :meth:`reserve_positions_` may put others in their place."""
        return tuple(rotary.get_buffer(name) for rotary in self.rotaries for name in ("cosine", "signed_sine"))

    def reserve_positions_(self, length: int) -> None:
        """Make the rotary tables hold at least ``length`` positions; tables that do are left where they are."""
        for rotary in self.rotaries:
            assert isinstance(rotary, RotaryEmbedding)
            rotary.reserve_(length, self.device, self.dtype)

    def forward(
        self,
        tokens: Tensor,
        attention: Attention | None = None,
        *,
        rows: Tensor | None = None,
        plan: LayerPlan | None = None,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: int64 ``[batch, tokens]`` on the model's device.
            attention: default plain causal attention within this call, from position 0; another one needs
                :meth:`reserve_positions_`.
            rows: int64 ``[batch]``, or ``[batch, wanted]``: the token, or tokens, of each text whose logits are
                wanted, perhaps none; default all. The head and what is behind the last layer see only these.
            plan: run only this part of what is resident; default all. Slots keep their numbers, so a cache
                serves every plan.

        Returns:
            ``[batch, tokens, vocabulary]``; with ``rows`` its shape and the vocabulary. In the model's dtype.

        Raises:
            InputError: a plan for another number of blocks, or one that runs what was not loaded; layers that the
                model never had do not count.
        """
        route = self._route(plan or self.plan)
        if attention is None:
            self.reserve_positions_(tokens.shape[1])
            attention = CausalAttention()
        pending = Pending(self._embed(tokens))
        for stop in route:
            pending = stop.block(
                pending, attention, stop.slot, runs_attention=stop.runs_attention, runs_mlp=stop.runs_mlp
            )
        if rows is not None:
            if rows.numel() == 0:  # the run was for the cache
                return torch.empty((*rows.shape, self.config.vocab_size), dtype=self.dtype, device=self.device)
            pending = pending.at(rows)
        logits: Tensor = self.lm_head(self.norm(pending)[1])
        cap = self.config.logit_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed_tokens(tokens)
        scale = self.config.embedding_scale
        return x if scale is None else x * _rounded(scale, self.dtype)

    def _route(self, plan: LayerPlan) -> tuple[_Stop, ...]:
        """The blocks that a plan runs; checked once for each plan."""
        route = self._routes.get(plan)
        if route is None:
            route = self._find_route(plan)
            if len(self._routes) >= _ROUTES_KEPT:
                self._routes.clear()
            self._routes[plan] = route
        return route

    def _find_route(self, plan: LayerPlan) -> tuple[_Stop, ...]:
        _check_blocks(plan, self.config)
        for part, runs, resident, has in (
            ("attention", plan.runs_attention, self.plan.runs_attention, lambda block: block.attention is not None),
            ("mlp", plan.runs_mlp, self.plan.runs_mlp, lambda block: block.mlp is not None),
        ):
            missing = [
                index
                for index, block in enumerate(self.config.blocks)
                if has(block) and runs(index) and not resident(index)
            ]
            if missing:
                raise InputError(
                    f"the plan runs the {part} of block {format_block_list(missing)}, which is not loaded; load the "
                    f"model with a plan that keeps it (loaded: {self.plan})"
                )
        route, slot = [], 0
        for block in self.blocks:
            assert isinstance(block, DecoderBlock)
            attends, feeds = plan.runs_attention(block.index), plan.runs_mlp(block.index)
            if attends or feeds:
                route.append(_Stop(block, slot, attends, feeds))
            slot += block.self_attn is not None
        return tuple(route)


def _check_blocks(plan: LayerPlan, config: DecoderConfig) -> None:
    if plan.num_blocks != config.num_blocks:
        raise InputError(f"the layer plan is for {plan.num_blocks} blocks, the model has {config.num_blocks}")


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    """A number as the dtype holds it."""
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """``[batch, tokens, width]`` -> ``[*rows.shape, width]``: some tokens of each text, rows as in the forward."""
    index = rows.reshape(len(rows), -1, 1).expand(-1, -1, x.shape[-1])
    return x.gather(1, index).view(*rows.shape, -1)
