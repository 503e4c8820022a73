"""A language model's loss from its last hidden states: the logits are never made.

    loss = −Σ log p(label) / count        log p as in `ops.linear_logprob`

The model's own forward runs as it is. What its output layer is handed is kept, and an empty tensor
goes on in its place; once that layer has run, its weight and what was kept make the loss.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from transformers import EncoderDecoderModel, PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from fusedpeft.errors import InputError
from fusedpeft.layers.linear import PLAIN_FORWARDS
from fusedpeft.layers.state import unwrap
from fusedpeft.ops import linear_cross_entropy

_LOSS = "_fusedpeft_loss"


def fuse_loss(model: nn.Module, fuse: bool = True) -> nn.Module:
    """In training mode, `model(..., labels=labels).loss` without the logits; returns the model.

        fp.fuse_loss(fp.attach(model, fp.LoRA()))
        model.train()(input_ids=ids, labels=ids).loss.backward()

    Causal LMs (labels shifted inside, as always) and encoder-decoders, under transformers' Trainer,
    Accelerate, PEFT's wrapper, with adapters on it or none, a frozen or a trained output layer,
    Gemma's soft-cap, a router's auxiliary loss, `num_items_in_batch` (which BART and T5 themselves
    ignore) and `shift_labels`. The output's `logits` are None then, and no cache is made unless
    `use_cache` asks for it. Without labels, and in evaluation mode, where metrics read the logits,
    all is as it was. Labels that are all ignored give 0, not NaN. Again is harmless; fuse False
    takes it off. TRL's SFTTrainer has a loss of its own that makes no logits either.

    Raises InputError, before anything is changed, for another kind of model, an output layer that
    is no plain nn.Linear (one with LoRA on it), and a loss or forward that is not transformers'
    own; in the first training call where the model makes more of its logits than this knows, or
    another loss of them.
    """
    inner = unwrap(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    made = vars(inner).get(_LOSS)
    if not fuse:
        if made is not None:
            made.remove()
            delattr(inner, _LOSS)
    elif made is None:
        head = _check(inner)
        setattr(inner, _LOSS, _FusedLoss(inner, head))
    return model


def logit_options(config: PretrainedConfig) -> dict[str, float | None]:
    """What a model does to h Wᵀ before the softmax, as `linear_logprob` takes it.

    A soft-cap (Gemma's final_logit_softcapping), a factor (Cohere's logit_scale, Falcon-H1's
    lm_head_multiplier), a divisor (Granite's logits_scaling).
    """
    config = config.get_text_config()
    factor = getattr(config, "logit_scale", None) or 1.0
    factor *= getattr(config, "lm_head_multiplier", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return {"softcap": softcap, "temperature": divisor / factor}


def _check(model: nn.Module) -> nn.Linear:
    """The output layer. Raises InputError for what cannot be fused."""
    kind = type(model).__name__
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    two = head is not None and model.config.is_encoder_decoder
    if head is None or not model.can_generate():
        raise InputError(f"fuse_loss: expected a causal LM or an encoder-decoder, got {kind}")
    if two and not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise InputError(
            f"fuse_loss: expected prepare_decoder_input_ids_from_labels of {kind}, as BART has, "
            "got none: its decoder's input comes from the labels in its forward alone"
        )
    if not isinstance(head, nn.Linear) or type(head).forward not in PLAIN_FORWARDS:
        hint = ": leave it out of the adapter's targets" if hasattr(head, "base_layer") else ""
        raise InputError(
            f"fuse_loss: expected an nn.Linear as output layer of {kind}, got "
            f"{type(head).__name__}{hint}"
        )
    if "forward" in vars(model) or "forward" in vars(head):
        raise InputError(
            f"fuse_loss: expected the forward of {kind} and its output layer, which something has "
            "replaced (TRL's SFTTrainer makes no logits without this: fuse_loss(model, False))"
        )
    if not two and model.loss_function is not ForCausalLMLoss:
        name = getattr(model.loss_function, "__name__", model.loss_function)
        raise InputError(f"fuse_loss: expected {kind} to take ForCausalLMLoss, got {name}")
    if not two and "CrossEntropyLoss" in inspect.unwrap(type(model).forward).__code__.co_names:
        raise InputError(  # BART's and its kin's causal models: their labels are aligned already
            f"fuse_loss: expected {kind} to take ForCausalLMLoss, which shifts the labels, got a "
            "loss that its forward makes by itself"
        )
    return head


def _router_weight(model: PreTrainedModel) -> float:
    """What a mixture of experts multiplies its auxiliary loss with."""
    for owner in (model, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):  # JetMoE's is the latter
            if (weight := getattr(owner, name, None)) is not None:
                return weight
    raise InputError(f"fuse_loss: expected router_aux_loss_coef of {type(model).__name__}")


class _FusedLoss:
    """Hooks around a model and its output layer, and what they keep during a call."""

    def __init__(self, model: PreTrainedModel, head: nn.Linear):
        self.names = tuple(inspect.signature(model.forward).parameters)
        self.shifts = not model.config.is_encoder_decoder
        self.options = logit_options(model.config)
        self.known = False  # that the logits are what `options` says, and the loss is of them
        self.of_head: list = []
        self.hook_head(head)
        self.of_model = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]
        self.clear()

    def hook_head(self, head: nn.Linear) -> None:
        """Moves the hooks to it from the one before."""
        for handle in self.of_head:
            handle.remove()
        self.head = head
        self.of_head = [
            head.register_forward_pre_hook(self.before_head),
            # First, as FSDP has the whole weight in this layer's call and not after it.
            head.register_forward_hook(self.after_head, prepend=True),
        ]

    def remove(self) -> None:
        for handle in (*self.of_model, *self.of_head):
            handle.remove()

    def clear(self) -> None:
        self.labels: Tensor | None = None  # of a call that makes no logits
        self.count: Tensor | int | None = None  # num_items_in_batch
        self.ignore, self.as_tuple = -100, False
        self.hidden: Tensor | None = None
        self.bias: Tensor | None = None
        self.loss: Tensor | None = None
        # What is let through: two tokens a row in the first call, to see what becomes of their
        # logits, none later; labels made up for them, and what `options` makes of their logits.
        self.probe: Tensor | None = None
        self.shown: Tensor | None = None

    def before(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.clear()
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        labels = given.get("labels")
        if labels is None or not model.training:
            return None
        if (head := _check(model)) is not self.head:  # OutputLayer's take turns
            self.hook_head(head)
        seen = 0 if self.known or torch.compiler.is_compiling() else min(2, labels.shape[-1])
        made_up = torch.arange(seen, device=labels.device)
        given["labels"] = self.probe = made_up.expand(*labels.shape[:-1], -1).contiguous()
        self.count = given.pop("num_items_in_batch", None)
        self.ignore = given.pop("ignore_index", -100)
        shifted = given.pop("shift_labels", None)
        if self.shifts:
            ahead = nn.functional.pad(labels, (0, 1), value=self.ignore)[..., 1:]
            self.labels = ahead if shifted is None else shifted
        else:
            self.labels = labels
            inputs = ("decoder_input_ids", "decoder_inputs_embeds")
            if all(given.get(name) is None for name in inputs):
                ids = model.prepare_decoder_input_ids_from_labels(labels)
                given[inputs[0]] = ids
                mask = given.get("decoder_attention_mask")
                if isinstance(model, EncoderDecoderModel) and mask is None:  # no other hides these
                    given["decoder_attention_mask"] = (ids != model.config.pad_token_id).to(ids)
        self.bias = getattr(model, "final_logits_bias", None)  # BART's, beside the layer
        asked = given.get("return_dict")  # PEFT says None
        self.as_tuple = not (model.config.return_dict if asked is None else asked)
        given["return_dict"] = True
        if "use_cache" in self.names and given.get("use_cache") is None:
            given["use_cache"] = False  # a copy of every key and value, for nobody
        return (), given

    def before_head(self, head: nn.Linear, args: tuple) -> tuple | None:
        if self.labels is None:
            return None
        self.hidden = args[0]
        if self.hidden.shape[:-1] != self.labels.shape:
            raise InputError(
                f"fuse_loss: expected as many last hidden states as labels, {[*self.labels.shape]},"
                f" got {[*self.hidden.shape[:-1]]}"
            )
        return (self.hidden[..., : self.probe.shape[-1], :],)

    def after_head(self, head: nn.Linear, args: tuple, logits: Tensor) -> None:
        if self.labels is None:
            return
        h, bias = self.hidden, head.bias
        if self.bias is not None:
            own = self.bias.to(h).view(-1)
            bias = own if bias is None else bias + own
            logits = logits + self.bias.to(logits)
        if logits.numel():
            cap = self.options["softcap"]
            capped = logits if cap is None else cap * torch.tanh(logits / cap)
            self.shown = (capped / self.options["temperature"]).detach()
        self.loss = linear_cross_entropy(
            h, head.weight, self.labels.to(h.device), bias, ignore_index=self.ignore,
            reduction="mean" if self.count is None else "sum", **self.options,
        )  # fmt: skip
        if self.count is not None:
            count = self.count
            self.loss = self.loss / (count.to(h.device) if isinstance(count, Tensor) else count)

    def after(self, model: nn.Module, args: tuple, output):
        labels, loss, shown, as_tuple = self.labels, self.loss, self.shown, self.as_tuple
        probe = self.probe
        self.clear()
        if labels is None or output is None:  # not ours, or the call has failed
            return None
        name = type(model).__name__
        if loss is None:
            raise InputError(f"fuse_loss: {name} did not call its output layer")
        aux = output.get("aux_loss")  # a mixture of experts', where asked for
        aux = None if aux is None else _router_weight(model) * aux.to(loss.device)
        others = [n for n, t in output.items() if n.endswith("_loss") and t is not None]
        if others not in ([], ["aux_loss"]):  # Switch's
            raise InputError(f"fuse_loss: {name} adds {others} to its loss")
        if shown is not None:
            self.known = self.compare(name, output, shown, probe, aux)
        if aux is not None:
            loss = loss + aux
        output = type(output)(**{**output, "loss": loss, "logits": None})
        return output.to_tuple() if as_tuple else output

    def compare(self, name: str, output, shown: Tensor, probe: Tensor, aux: Tensor | None) -> bool:
        """What the model made of the first tokens with what is made of the others here; False where
        they are too few to tell."""
        logits = output.logits.detach()
        scale = shown.abs().max() * torch.finfo(shown.dtype).eps
        if bool(((logits.to(shown) - shown).abs() > 8 * scale).any()):
            raise InputError(
                f"fuse_loss: {name} makes more of its logits than its output "
                "layer does, which the loss would lack: fuse_loss(model, False)"
            )
        ahead = 1 if self.shifts else 0
        logits, probe = logits[..., : logits.shape[-2] - ahead, :].float(), probe[..., ahead:]
        if not probe.numel():
            return False
        want = nn.functional.cross_entropy(logits.flatten(0, -2), probe.flatten())
        got = output.get("loss")
        made = None if got is None else got.detach().to(want) - (0.0 if aux is None else aux)
        within = 8 * torch.finfo(want.dtype if got is None else got.dtype).eps + 1e-5
        if made is None or bool((made - want).abs() > within * want.abs().clamp(min=1.0)):
            raise InputError(
                f"fuse_loss: {name} makes another loss of its logits than cross-entropy with the "
                f"labels{' shifted' * ahead}: fuse_loss(model, False)"
            )
        return True
