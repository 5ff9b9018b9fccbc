"""The typed recipe: every key a YAML recipe may hold, its type, range, default and meaning.

One recipe drives all four jobs. Unknown keys are errors (a misspelt key that is silently ignored is a run wasted), and
types are strict (a string is never taken for a number), so that what a recipe says is what runs. Rejected: dataclasses
plus hand-written checks (no located errors), OmegaConf/Hydra (interpolation and instantiation by dotted path make a
recipe a program). This module imports neither torch nor transformers: a wrong recipe must be refused at once.

Units are in the names or descriptions: tokens, sequences, steps (one step = one optimizer update), bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """Base of all sections: closed (no unknown keys), strict (no silent coercion), immutable after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Model(Section):
    """The base checkpoint: a Hugging Face folder or hub name, or (for `--plan` only) a released geometry by name."""

    path: str | None = Field(None, description="folder (from the working directory) or hub name of the base checkpoint")
    released: str | None = Field(None, description="published geometry for --plan without weights, e.g. MiMo-V2.5-Pro")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of activations and compute weights")
    trust_remote_code: bool = Field(False, description="allow modeling code shipped inside the checkpoint to run")

    @model_validator(mode="after")
    def _has_a_source(self):
        if self.path is None and self.released is None:
            raise ValueError("model.path (a checkpoint folder) or model.released (a published geometry) is required")
        return self


class Data(Section):
    """Text for training and evaluation: local JSONL/JSON/Parquet/text files (globs allowed) or a hub dataset."""

    train: list[str] = Field(description="files, globs, or one hub dataset name (prefix hub:)")
    heldout: list[str] = Field(description="evaluation files; reported domain by domain, one domain per file")
    text_field: str = Field("text", description="column that holds the document")
    sequence_length: Annotated[int, Field(ge=8)] = Field(512, description="tokens per packed sequence")
    eval_sequences: PositiveInt = Field(32, description="packed held-out sequences per domain in the final evaluation")
    shuffle: bool = Field(True, description="new order of sequences each epoch, from the recipe's seed")


class Quantization(Section):
    """How expert weights are rounded. What is rounded is not an option: routed experts only."""

    scale_rule: Literal["floor", "rceil", "even", "mse"] = Field("even", description="choice of a block's power-of-two scale")
    ste: Literal["identity", "clip"] = Field("identity", description="gradient of saturated elements: passed, or zeroed")
    expected_tensors: PositiveInt | None = Field(None, description="refuse unless this many tensors match")


class WarmStart(Section):
    """Choice of the first codes, before any gradient step."""

    method: Literal["none", "gptq"] = Field("none", description="none: plain rounding; gptq: error-compensating rounding")
    sequences: PositiveInt = Field(64, description="training sequences whose expert inputs give the second moments")
    damping: PositiveFloat = Field(0.01, description="added to the diagonal of the second moments, as a share of their mean")


class Oscillation(Section):
    """Control of weights that flip back and forth between two codes late in training."""

    method: Literal["none", "ema", "freeze"] = Field("none", description="ema: round the running mean of the master weight "
                                                      "(TetraJet's Q-EMA); freeze: pin elements that flip too often")
    ema_decay: Fraction = Field(0.99, description="decay per step of the running mean")
    freeze_flips: PositiveInt = Field(4, description="flips within the window after which an element is pinned")
    start: Fraction = Field(0.3, description="share of the run after which control begins")


class Loss(Section):
    """Weights of the training losses; at least one must be positive."""

    kl: NonNegativeFloat = Field(1.0, description="KL(teacher || student) on the logits, nats per token")
    cross_entropy: NonNegativeFloat = Field(0.0, description="next-token cross entropy, nats per token")
    hidden: NonNegativeFloat = Field(0.0, description="squared error of each decoder layer's output relative to the "
                                     "teacher's output variance, mean over layers")
    temperature: PositiveFloat = Field(1.0, description="softmax temperature of the KL term")
    chunk_tokens: PositiveInt = Field(2048, description="tokens whose logits are held at once")

    @model_validator(mode="after")
    def _not_all_zero(self):
        if self.kl == 0 and self.cross_entropy == 0 and self.hidden == 0:
            raise ValueError("loss.kl, loss.cross_entropy and loss.hidden are all 0: nothing would be trained")
        return self


class Optimizer(Section):
    """Update of the float32 master weights of the experts (and of whatever else `train` names)."""

    name: Literal["adamw", "muon"] = Field("adamw", description="muon: Newton-Schulz-orthogonalised momentum per expert")
    learning_rate: PositiveFloat = Field(1e-4, description="peak; for muon in units of AdamW (update RMS matched)")
    min_learning_rate_ratio: Fraction = Field(0.0, description="floor of the schedule as a share of the peak")
    warmup_steps: NonNegativeInt = Field(10, description="linear warm-up from 0")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field("cosine", description="wsd: constant, then linear decay")
    decay_fraction: Fraction = Field(0.3, description="share of the run that wsd spends decaying")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False, description="AdamW moment decays; muon uses the first")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are scaled down to this global norm")


class QAT(Section):
    """The quantization-aware training job."""

    steps: PositiveInt = Field(description="optimizer updates")
    batch_size: PositiveInt = Field(8, description="packed sequences per process and micro-step")
    gradient_accumulation: PositiveInt = Field(1, description="micro-steps per optimizer update")
    train: Literal["experts", "all"] = Field("experts", description="which weights get gradients")
    freeze_router: bool = Field(True, description="with train: all, keep routers as they are")
    loss: Loss = Field(default_factory=Loss)
    optimizer: Optimizer = Field(default_factory=Optimizer)
    warm_start: WarmStart = Field(default_factory=WarmStart)
    oscillation: Oscillation = Field(default_factory=Oscillation)
    average_last: Fraction = Field(0.0, description="round the mean of the masters over this last share of the run")
    evaluation_dtype: Literal["model", "float32"] = Field("model", description="float32: final evaluation on float32 copies")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    log_every: PositiveInt = Field(10, description="steps between lines of metrics.jsonl")
    health_every: PositiveInt = Field(50, description="steps between per-layer, per-expert health lines")
    checkpoint_every: PositiveInt = Field(100, description="steps between checkpoints")
    keep_last: PositiveInt = Field(2, description="complete checkpoints kept")


class Cluster(Section):
    """The machines the recipe is written for; read by --plan only (Accelerate's own file launches the run)."""

    nodes: PositiveInt = 1
    accelerators_per_node: PositiveInt = 1
    memory_gib: PositiveFloat = Field(description="memory of one accelerator")
    sharding: Literal["ddp", "zero3", "fsdp2"] = Field("ddp", description="how weights and optimizer state are divided")
    expert_parallel: PositiveInt = Field(1, description="ranks that divide the experts of a layer among them")
    offload_optimizer: bool = Field(False, description="keep master weights and optimizer state in host memory")
    host_memory_gib: PositiveFloat | None = Field(None, description="host memory of one node, for offload_optimizer")
    network_gb_per_s: PositiveFloat | None = Field(None, description="GB/s that one accelerator receives from other nodes")
    link_gb_per_s: PositiveFloat | None = Field(None, description="GB/s that one accelerator receives within its node")

    @model_validator(mode="after")
    def _divides(self):
        ranks = self.nodes * self.accelerators_per_node
        if ranks % self.expert_parallel:
            raise ValueError(f"cluster.expert_parallel={self.expert_parallel} does not divide {ranks} ranks")
        if self.offload_optimizer and self.host_memory_gib is None:
            raise ValueError("cluster.offload_optimizer needs cluster.host_memory_gib")
        return self


class Tracking(Section):
    """Where metrics go besides runs/<name>/."""

    wandb: Literal["off", "auto", "offline", "online"] = Field("off", description="auto: online if a key is set, else offline")
    project: str = "fp4-dflash"


class Recipe(Section):
    """One recipe file. `name` names the run folder runs/<name>/."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NonNegativeInt = 0
    output: str = Field("runs", description="parent of the run folder")
    model: Model
    data: Data
    quantization: Quantization = Field(default_factory=Quantization)
    qat: QAT
    cluster: Cluster | None = None
    tracking: Tracking = Field(default_factory=Tracking)
