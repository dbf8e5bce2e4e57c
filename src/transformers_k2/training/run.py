"""The parts of a recipe's run in the order in which they need each other, and what is done with them.

What it gives up: a model that is split over processes is compared with its saved copy by the loss, not bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from ..moe import RouterBalance
from ..parallel import Layout
from ..parallel.pipeline import Pipeline
from ..quantization.qat import QATSchedule
from ..rope import set_rope_scaling
from . import machine
from .adapters import load_adapter, load_quantised, save_adapter
from .callbacks import Metrics, ProgressBar, QATPhases, Saver
from .chat_data import end_of_turn
from .context import ContextLosses
from .data import Data
from .errors import NonFiniteLossError
from .expert_load import ExpertLoadMonitor
from .export import export_hub, export_int4
from .flops import peak_flops, training_flops_per_token
from .int4_report import Agreement, Int4Losses, compare
from .muon_clip_monitor import MuonClipMonitor
from .optimizers import MuonClip
from .prepare import build_trainer, prepare_model
from .recipe import NF4, Int4, Int4QAT, Recipe
from .report import QuantisedBase
from .step_monitor import Gather
from .trainer import RecipeTrainer

_RELOAD_LIMIT = 5 * 10**9  # parameters that rank 0 loads again to check what was saved


class Run:
    """The parts of a run, built in the order in which they need each other."""

    def __init__(
        self,
        recipe: Recipe,
        config: Any,
        data: Data,
        layout: Layout,
        folder: Path,
        progress: Progress,
        signal: machine.StopSignal,
    ) -> None:
        self.recipe, self.data, self.layout, self.folder = recipe, data, layout, folder
        task = progress.add_task("Building the model", total=1, note="")
        with _quiet():
            self.model: Any = prepare_model(recipe, config, data.tokenizer, layout)
        self.parameters = count_parameters(config)
        progress.update(task, completed=1, note=f"{self.parameters[0] / 1e6:,.1f} M parameters")
        router, training = recipe.router, recipe.training
        parallel = recipe.parallel
        self.pipeline = (
            Pipeline(self.model, layout, parallel.schedule, parallel.micro_batches_per_run)
            if layout.pipeline > 1
            else None
        )
        group = None if self.pipeline is None else self.pipeline.data_group
        self.balance = RouterBalance(
            self.model,
            bias_update_speed=0.0 if recipe.adapter is not None else router.bias_update_speed,
            balance_loss=router.balance_loss,
            process_group=group,
        )
        device = next(self.model.parameters()).device
        dtype = torch.bfloat16 if training.dtype == "bfloat16" else torch.float32
        peak = recipe.logging.peak_tflops
        peak_here = peak * 1e12 if peak is not None else peak_flops(device, dtype)
        self.metrics = Metrics(
            folder / "metrics.jsonl",
            recipe.tokens_per_step,
            training_flops_per_token(config, recipe.data.sequence_length),
            None if peak_here is None else peak_here * layout.world_size,
        )
        self.saver = Saver(recipe.checkpoint.every, signal)
        freeze = training.steps - recipe.num_steps(router.bias_freeze)
        title = recipe.model.config or recipe.model.weights or ""
        gather = None if self.pipeline is None else self.pipeline.gather
        self.loads = ExpertLoadMonitor(self.balance, folder, freeze, f"Expert load of {title}", gather)
        self.clips = _monitor(recipe, folder, gather)
        bar = ProgressBar(progress, self.metrics)
        callbacks = [self.metrics, bar, self.saver]
        if isinstance(recipe.quantization, Int4QAT):
            phases = (recipe.quantization.warmup, recipe.quantization.freeze)
            schedule = QATSchedule(*map(recipe.num_steps, phases))
            callbacks.insert(0, QATPhases(self.model, schedule))  # before an evaluation that another asks for
        self.trainer: RecipeTrainer = build_trainer(
            recipe, self.model, data, layout, folder, callbacks, self.balance, self.pipeline,
            phase_begins=self._phase_begins,
        )  # fmt: skip
        self.loads.attach(self.trainer)  # in front of trackers, which log what these add
        if self.clips is not None:
            self.clips.attach(self.trainer)
        bar.num_batches = len(self.trainer.held_out)

    def measure_context(self) -> ContextLosses | None:
        """The losses at the lengths of a context recipe, before it trains."""
        if self.recipe.context is None:
            return None
        losses = ContextLosses(self.recipe, self.data, self.layout)
        losses.measure_before(self.model, self.trainer)
        _reshard(self.model)
        return losses

    def measure_int4(self) -> Int4Losses | None:
        """The losses of a recipe with INT4 training, before it trains."""
        if not self._trains_int4:
            return None
        losses = Int4Losses(self.model, self.trainer)
        _reshard(self.model)
        return losses

    def quantised_base(self) -> QuantisedBase | None:
        """What is under an adapter that was trained on 4-bit weights."""
        section = self.recipe.quantization
        if not isinstance(section, Int4 | NF4):
            return None
        frozen = [value for value in self.model.parameters() if not value.requires_grad]
        itemsize = getattr(torch, self.recipe.training.weights_dtype).itemsize
        return QuantisedBase(
            section.method,
            section.group_size,
            isinstance(section, NF4) and section.double_quant,
            sum(value.nbytes for value in frozen),
            self.parameters[0] * itemsize,
        )

    @property
    def _trains_int4(self) -> bool:
        return isinstance(self.recipe.quantization, Int4QAT)

    def train(self, console: Console) -> None:
        """Train from the newest checkpoint of the folder, or from the start."""
        assert self.trainer.checkpoints is not None
        if (newest := self.trainer.checkpoints.latest()) is not None:
            step = self.trainer.checkpoints.read_meta(newest)["step"]
            console.print(
                f"Continuing at step {step} of {self.recipe.training.steps}, from {newest}", highlight=False
            )
        try:
            self.trainer.train(resume_from_checkpoint=True)
        except NonFiniteLossError as error:
            advice = self.metrics.advice()
            raise NonFiniteLossError(str(error) if advice in str(error) else f"{error} {advice}") from None
        except FloatingPointError as error:  # MuonClip looks at logits before there is a loss to look at
            raise NonFiniteLossError(
                f"Training stopped at step {self.trainer.state.global_step + 1}: {error} {self.metrics.advice()}"
            ) from None

    def save(self) -> None:
        """The model, or its adapter, in the hub's layout, packed if it was trained for INT4, and the tokenizer."""
        model, tokenizer = self.model, self.data.tokenizer
        model.config.use_cache = True  # Trainer turned it off for training
        if self.recipe.data.kind == "chat":
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
        main = machine.rank() == 0
        if self.recipe.adapter is not None:
            if main:
                save_adapter(model, self.folder)
        elif self.layout.splits_the_model:
            assert self.trainer.checkpoints is not None
            export_hub(self.trainer.checkpoints.path(self.recipe.training.steps), model, self.folder)
        elif main and self._trains_int4:
            export_int4(model, self.folder)
        elif main:
            model.save_pretrained(self.folder)
        if main:
            tokenizer.save_pretrained(self.folder)
        machine.barrier()

    def reload_and_generate(self) -> tuple[str, str, Agreement | None]:
        """Load what was saved through the Auto classes, compare it with the model, and sample from it, on rank 0.

        Returns:
            What it writes, how it compares, and, of a whole model that was trained for INT4, by how many weights and codes.

        Raises:
            RuntimeError: the reloaded model computes something else.
        """
        if self.parameters[0] > _RELOAD_LIMIT:
            return "", f"no: {self.parameters[0] / 1e9:.0f} G parameters on one process", None
        batch = {key: value[:1] for key, value in self.trainer.held_out[0].items()}
        loss, logits = _loss_and_logits(self.trainer, batch, self.recipe.adapter is not None)
        if machine.rank() != 0:
            return "", "", None
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        with _quiet():
            reloaded = self._reload()
        with torch.no_grad():
            output = reloaded.eval()(
                **{key: value.to(reloaded.device) for key, value in batch.items()}, use_cache=False
            )
        classes = f"with {'PeftModel' if self.recipe.adapter else 'AutoModelForCausalLM'} and AutoTokenizer: "
        if logits is not None:
            same = torch.equal(logits, output.logits)
            agreement = compare(self.model, reloaded, self.folder, same) if self._trains_int4 else None
            if not same or (agreement is not None and agreement != Agreement(0, 0, True)):
                raise RuntimeError(
                    f"The model loaded from {self.folder} differs from the one that was saved, by up to "
                    f"{(logits - output.logits).abs().max():.3g} in the logits{f', {agreement}' if agreement else ''}."
                )
            packed = " of the INT4 weights, dequantised," if self._trains_int4 else ""
            text = f"{classes}the logits{packed} are the same to the bit"
            return _sample(self.recipe, reloaded, tokenizer), text, agreement
        expected, found = float(loss), float(output.loss)
        if abs(expected - found) > 1e-3 * abs(expected):
            raise RuntimeError(
                f"The model loaded from {self.folder} has a loss of {found:.5f} where the one that was saved has "
                f"{expected:.5f}."
            )
        text = f"{classes}on a held-out row its loss is {found:.5f}, as trained {expected:.5f}"
        return _sample(self.recipe, reloaded, tokenizer), text, None

    def _reload(self) -> Any:
        """The model in the folder; an adapter on the base that it names, quantised as in training, through PEFT."""
        recipe, dtype = self.recipe, getattr(torch, self.recipe.training.weights_dtype)
        model: Any
        if isinstance(recipe.quantization, Int4 | NF4):
            assert recipe.model.weights is not None
            compute = getattr(torch, recipe.training.dtype)
            model = load_quantised(
                recipe.model.weights, self.model.config, self.layout, recipe.quantization, dtype, compute
            ).eval()
        else:
            weights: Any = self.folder if recipe.adapter is None else recipe.model.weights
            dequantised = (
                {"dequantize": True} if self._trains_int4 else {}
            )  # the logits of training, to the bit
            model = AutoModelForCausalLM.from_pretrained(
                weights,
                **dequantised,
                device_map=self.trainer.args.device,
                dtype=dtype,  # a base may be stored in another
            )
        model.set_experts_implementation(self.model.config._experts_implementation)
        model.set_attn_implementation(self.model.config._attn_implementation)
        if self.recipe.adapter is not None:
            model = load_adapter(model, self.folder)
        return model

    def _phase_begins(self, number: int) -> None:
        """The newest scaling of the stages so far: a run that continues in a later stage has not seen the earlier ones."""
        if (context := self.recipe.context) is None:
            return
        scalings = [
            stage.rope_scaling for stage in context.stages[: number + 1] if stage.rope_scaling is not None
        ]
        if scalings:
            set_rope_scaling(self.model, scalings[-1], context.max_position_embeddings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, beside those of the run."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def count_parameters(config: Any) -> tuple[int, int]:
    """Parameters of the whole model, and those that a token uses."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for key, parameter in model.named_parameters() if ".experts." in key)
    return total, total - routed + routed * config.num_experts_per_tok // config.n_routed_experts


def _reshard(model: torch.nn.Module) -> None:
    """After an evaluation FSDP2 leaves some weights whole; an optimizer made then would update copies of them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _loss_and_logits(trainer: RecipeTrainer, batch: dict[str, Any], has_adapter: bool) -> tuple[Any, Any]:
    """Of the trained model on one batch that every process gives; logits where no process lacks a part of it."""
    # Without the autocast that Accelerate wrapped around its forward: what is saved knows nothing of it.
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    inputs = trainer._prepare_inputs(batch)
    model.eval()
    if trainer.pipeline is not None:
        loss, count = trainer.pipeline.evaluate(inputs, 1)
        return loss / count, None
    if trainer.layout.splits_the_model:
        return model(**inputs, use_cache=False).loss, None
    plain = model.get_base_model() if has_adapter else model
    chunk, plain.loss_chunk_tokens = plain.loss_chunk_tokens, None
    output = model(**inputs, use_cache=False)
    plain.loss_chunk_tokens = chunk
    return output.loss, output.logits


def _sample(recipe: Recipe, model: Any, tokenizer: Any) -> str:
    settings = recipe.generation
    sampling = {"temperature": settings.temperature} if settings.temperature else {}
    if recipe.data.kind == "chat":
        messages = [{"role": "user", "content": settings.prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
    else:
        inputs = tokenizer(settings.prompt, return_tensors="pt").to(model.device)
    set_seed(recipe.training.seed)
    output = model.generate(
        **inputs, max_new_tokens=settings.max_new_tokens, do_sample=bool(sampling), **sampling
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _monitor(recipe: Recipe, folder: Path, gather: Gather | None) -> MuonClipMonitor | None:
    """For optimizers that clip."""
    optimizer = recipe.optimizer
    if not isinstance(optimizer, MuonClip) or optimizer.qk_clip_tau is None or recipe.adapter is not None:
        return None
    title = f"MuonClip on {recipe.model.config or recipe.model.weights}, tau {optimizer.qk_clip_tau:g}"
    return MuonClipMonitor(folder, title=title, gather=gather)
