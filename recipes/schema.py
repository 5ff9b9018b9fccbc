"""The typed recipe: every key a YAML recipe may hold, its type, range, default and meaning.

One recipe drives all four jobs. Unknown keys are errors (a misspelt key that is silently ignored is a run wasted), and
types are strict (a string is never taken for a number), so that what a recipe says is what runs. Rejected: dataclasses
plus hand-written checks (no located errors), OmegaConf/Hydra (interpolation and instantiation by dotted path make a
recipe a program). This module imports neither torch nor transformers: a wrong recipe must be refused at once.

Units are in the names or descriptions: tokens, sequences, steps (one step = one optimizer update), bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, create_model, model_validator

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

    path: str | None = Field(None, description="folder or hub name of the base checkpoint")
    released: str | None = Field(None, description="published geometry for --plan without weights, e.g. MiMo-V2.5-Pro")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="dtype of activations and compute weights")
    trust_remote_code: bool = Field(False, description="allow modeling code shipped inside the checkpoint to run")

    @model_validator(mode="after")
    def _has_a_source(self):
        if self.path is None and self.released is None:
            raise ValueError("model.path (a checkpoint folder) or model.released (a published geometry) is required")
        return self


class Source(Section):
    """One part of the training data, where a name alone does not say enough."""

    path: str | None = Field(None, description="file, glob or save_to_disk folder")
    hub: str | None = Field(None, description="name of a dataset on the hub")
    config: str | None = Field(None, description="configuration of the hub dataset")
    split: str = Field("train", description="split of the hub dataset or of the folder")
    revision: str | None = Field(None, description="commit, branch or tag of the hub dataset")
    documents: PositiveInt | None = Field(None, description="at most this many documents; a hub dataset is then streamed")
    weight: PositiveFloat | None = Field(None, description="share of documents in the mixture, relative to the other sources'; "
                                         "none everywhere: one source after the other, each once")

    @model_validator(mode="after")
    def _one_place(self):
        if (self.path is None) == (self.hub is None):
            raise ValueError("a source has either path or hub")
        return self


# An entry of data.train: a name, or a source with keys of its own. Tagged, so that a mistake in one is told as one mistake.
SOURCE_TAGS = ("a name", "a source")
SourceEntry = Annotated[
    Annotated[str, Tag(SOURCE_TAGS[0])] | Annotated[Source, Tag(SOURCE_TAGS[1])],
    Discriminator(lambda entry: SOURCE_TAGS[isinstance(entry, dict | Source)])]


class Data(Section):
    """Text for training and evaluation: files (JSON lines, Parquet, CSV, text, .gz; globs allowed) or hub datasets.

    A row of a table is a document, and so is a whole .txt file. Rows may be text, or dialogues (messages, conversations,
    prompt and response), which the chat template renders.
    """

    train: Annotated[list[SourceEntry], Field(min_length=1)] = Field(
        description="files, globs, hub:NAME, or sources of several keys (below)")
    heldout: Annotated[list[str], Field(min_length=1)] = Field(description="evaluation files, one for each reported domain")
    text_field: str = Field("text", description="column that holds the document")
    sequence_length: Annotated[int, Field(ge=8)] = Field(512, description="tokens per packed sequence")
    eval_sequences: PositiveInt = Field(32, description="packed held-out sequences per domain in the final evaluation")
    shuffle: bool = Field(True, description="new order of sequences each epoch, from the recipe's seed")
    loss_on: Literal["all", "answers"] = Field(
        "all", description="tokens that losses and held-out figures cover: all, or of dialogues the assistant's turns alone "
        "(texts count whole)")


class Chat(Section):
    """How prompts and dialogues become tokens, in every job (`modeling/dialogue_tokens.py` has the rules)."""

    prompts: Literal["auto", "chat", "text"] = Field(
        "auto", description="prompts that are strings: as one user turn through the chat template, or as they are; auto: chat "
        "where there is a template, but for rows of kind open and prompts that begin with a control token")
    template_options: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="switches of the chat template, e.g. {enable_thinking: false}")


class Quantization(Section):
    """How expert weights are rounded. What is rounded is not an option: routed experts only."""

    scale_rule: Literal["floor", "rceil", "even", "mse"] = Field("even", description="choice of a block's power-of-two scale")
    ste: Literal["identity", "clip"] = Field("identity", description="gradient of saturated elements: passed, or zeroed")
    expected_tensors: PositiveInt | None = Field(None, description="refuse unless this many tensors match")


class WarmStart(Section):
    """Choice of the initial codes, before any gradient step."""

    method: Literal["none", "gptq", "fisher"] = Field(
        "none", description="none: plain rounding; gptq: error-compensating rounding, by the second moments of each expert's "
        "inputs; fisher: also by those of the gradients at its outputs")
    sequences: PositiveInt = Field(64, description="training sequences that give the second moments")
    damping: PositiveFloat = Field(0.01, description="added to the diagonal of the inputs' moments, as a share of their mean")
    output_damping: PositiveFloat = Field(0.01, description="the same for the outputs' moments (fisher)")
    rows_together: PositiveInt = Field(4, description="fisher: outputs rounded side by side; fewer are better and slower")
    layers_together: NonNegativeInt = Field(0, description="layers measured at once, the layers before them already rounded: "
                                            "later ones then compensate what earlier ones lost; 0: all in the unrounded model")
    folder: str | None = Field(None, description="the codes are kept in this folder, and taken from there by the next run with "
                               "the same weights, text and settings of the start; none: chosen anew by every run")
    moments_gib: PositiveFloat = Field(4.0, description="moments of as many layers are gathered at once as fit; at least one")


class Oscillation(Section):
    """Control of weights that flip back and forth between two codes late in training."""

    method: Literal["none", "ema", "freeze", "reset"] = Field(
        "none", description="ema: round the running mean of the master weight (TetraJet's Q-EMA); freeze: pin elements that "
        "flip too often; reset: put the masters of oscillating elements on their rounded value (TetraJet-v2's OsciReset)")
    ema_decay: Fraction = Field(0.99, description="decay per step of the running mean")
    freeze_flips: PositiveInt = Field(4, description="flips within the window after which an element is pinned")
    reset_every: PositiveInt = Field(10, description="steps over which movements are summed before each reset")
    reset_ratio: PositiveFloat = Field(16.0, description="an element oscillates if its rounded value moves this many times as "
                                       "far as its master")
    start: Fraction = Field(0.3, description="share of the run after which control begins")


class Scales(Section):
    """Block scales s + d, with s the scale rule's exponent and d one of -1, 0, 1."""

    method: Literal["rule", "searched", "learned"] = Field(
        "rule", description="rule: d = 0; searched: each block's d of least error, chosen with the initial codes and kept; "
        "learned: searched, then moved by gradient (LSQ, arXiv 1902.08153, on powers of two)")
    learning_rate: PositiveFloat = Field(0.02, description="learned: peak rate of d in octaves per update")


class SoftRounding(Section):
    """A mixture of the two neighbouring codes instead of the nearest one, sharpened until it is the nearest one."""

    method: Literal["none", "annealed"] = Field("none", description="annealed: a tanh step between neighbours (DSQ, arXiv "
                                                "1908.05033) that grows steeper from update to update")
    sharpness: tuple[PositiveFloat, PositiveFloat] = Field((4.0, 40.0), strict=False, description="of the step, first and last")
    until: Annotated[float, Field(gt=0.0, le=0.95)] = Field(0.5, description="share of the run after which rounding is hard")


class GridPull(Section):
    """CAGE (arXiv 2510.18784): masters are pulled to their rounded values beside the optimizer, as weight decay pulls to 0."""

    strength: NonNegativeFloat = Field(0.0, description="share, in units of the learning rate, of the distance to the rounded "
                                       "value that an update removes; 0: off")
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.5, description="share of the run before the pull begins; it then "
                                                           "grows linearly to its full strength at the end")


class Loss(Section):
    """Weights of the training losses; at least one must be positive."""

    kl: NonNegativeFloat = Field(1.0, description="KL(teacher || student) on the logits, nats per token")
    cross_entropy: NonNegativeFloat = Field(0.0, description="next-token cross entropy, nats per token")
    hidden: NonNegativeFloat = Field(0.0, description="squared error of each decoder layer's output relative to the "
                                     "teacher's output variance, mean over layers")
    hidden_kl: NonNegativeFloat = Field(0.0, description="KL(teacher || student) of the softmax over the features of the last "
                                        "hidden state, nats per token")
    temperature: PositiveFloat = Field(1.0, description="softmax temperature of the KL term")
    chunk_tokens: PositiveInt = Field(2048, description="tokens whose logits are held at once")
    gradient: Literal["recompute", "immediate"] = Field(
        "recompute", description="logits are computed again in the backward pass, or their gradient is taken with them: two "
        "products with the vocabulary less (needs train: experts)")

    @model_validator(mode="after")
    def _not_all_zero(self):
        if self.kl == self.cross_entropy == self.hidden == self.hidden_kl == 0:
            raise ValueError("loss.kl, loss.cross_entropy, loss.hidden and loss.hidden_kl are all 0: nothing would be trained")
        return self


class Optimizer(Section):
    """Update of the float32 master weights of the experts (and of whatever else `train` names)."""

    name: Literal["adamw", "muon"] = Field("adamw", description="muon: Newton-Schulz-orthogonalised momentum per expert")
    learning_rate: PositiveFloat = Field(1e-4, description="peak; for muon in units of AdamW (update RMS matched)")
    relative: bool = Field(False, description="adamw: learning_rate is a share of each tensor's root mean square at the start")
    min_learning_rate_ratio: Fraction = Field(0.0, description="floor of the schedule as a share of the peak")
    warmup_steps: NonNegativeInt = Field(10, description="linear warm-up from 0")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field("cosine", description="wsd: constant, then linear decay")
    decay_fraction: Fraction = Field(0.3, description="share of the run that wsd spends decaying")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False, description="AdamW moment decays; muon uses the first")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay")
    max_grad_norm: PositiveFloat = Field(1.0, description="gradients are scaled down to this global norm")

    @model_validator(mode="after")
    def _units_agree(self):
        if self.relative and self.name != "adamw":
            raise ValueError(f"optimizer.relative: expected optimizer.name adamw, not {self.name}")
        return self


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
    scales: Scales = Field(default_factory=Scales)
    soft_rounding: SoftRounding = Field(default_factory=SoftRounding)
    grid_pull: GridPull = Field(default_factory=GridPull)
    average_last: Fraction = Field(0.0, description="round the mean of the masters over this last share of the run")
    teacher: Literal["model", "packed", "disk"] = Field(
        "model", description="model: the original weights in memory; packed: its experts in the FP8 codes of the base, decoded "
        "layer by layer (sharded, of an FP8 base; elsewhere as model); disk: its last hidden states of all rows that are "
        "trained on, computed once (the same KL, no second model in memory, no pass of it in a step)")
    teacher_gib: PositiveFloat = Field(64.0, description="limit of those states on disk, for all ranks")
    evaluation_dtype: Literal["model", "float32"] = Field("model", description="float32: final evaluation on float32 copies")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    log_every: PositiveInt = Field(10, description="steps between lines of metrics.jsonl")
    heldout_every: NonNegativeInt = Field(0, description="steps between measurements on held-out text, the first before any; "
                                          "0: only the final evaluation")
    heldout_sequences: PositiveInt = Field(8, description="packed held-out sequences per domain of those measurements")
    result: Literal["last", "best"] = Field("last", description="what model/ is: the last step, or the one with the least KL "
                                            "on held-out text, whose checkpoint is kept (needs heldout_every)")
    patience: NonNegativeInt = Field(0, description="measurements on held-out text without a lower KL after which the run "
                                     "ends; 0: it never ends early")
    health_every: PositiveInt = Field(50, description="steps between per-layer, per-expert health lines")
    checkpoint_every: PositiveInt = Field(100, description="steps between checkpoints")
    keep_last: PositiveInt = Field(2, description="complete checkpoints kept")

    @model_validator(mode="after")
    def _methods_agree(self):
        if self.loss.gradient == "immediate" and self.train != "experts":
            raise ValueError("qat.loss.gradient: immediate gives the head no gradient; use recompute with qat.train: all")
        if self.teacher == "disk" and (self.train != "experts" or self.loss.hidden > 0):
            raise ValueError("qat.teacher: disk keeps the last hidden state alone and takes the model's own head, so it needs "
                             "qat.train: experts and qat.loss.hidden: 0")
        if self.optimizer.relative and self.grid_pull.strength:
            raise ValueError("qat.optimizer.relative: grid_pull is in units of one rate for all; expected relative: false")
        if not self.heldout_every and (self.result == "best" or self.patience):
            raise ValueError("qat.result: best and qat.patience go by measurements on held-out text; expected "
                             "qat.heldout_every above 0")
        if self.result == "best" and (self.average_last or self.soft_rounding.method != "none"):
            raise ValueError("qat.result: best takes the weights of one step, as they are served; expected "
                             "qat.average_last: 0 and qat.soft_rounding.method: none")
        if self.oscillation.method == "freeze" and self.scales.method != "rule":
            raise ValueError("qat.oscillation.method: freeze pins values under the scale rule's scales; expected "
                             "qat.scales.method: rule")
        if self.scales.method == "learned" and (self.soft_rounding.method != "none" or self.optimizer.name != "adamw"):
            raise ValueError("qat.scales.method: learned needs qat.optimizer.name: adamw and qat.soft_rounding.method: none")
        return self


class Drafter(Section):
    """Architecture of the DFlash drafter; hidden size, embedding and head are the target's."""

    num_hidden_layers: PositiveInt = 5
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    v_head_dim: PositiveInt | None = Field(None, description="width of values, if not head_dim")
    intermediate_size: PositiveInt
    target_layer_ids: list[NonNegativeInt] | None = Field(None, description="target layers whose outputs are the context; "
                                                          "none: five (or all), evenly from the first to the last")
    block_size: Annotated[int, Field(ge=2)] = Field(8, description="anchor and drafted tokens of a round")
    window: PositiveInt | None = Field(1024, description="keys nearer than this many positions are seen; none: all")
    causal: bool = Field(False, description="positions of a block see only those before them")
    attention_sink_bias: bool = Field(True, description="one learned extra logit per head")
    attention_value_scale: float | None = Field(None, description="factor on the values")
    partial_rotary_factor: Fraction = Field(0.5, description="share of head_dim that is rotated")
    rotary_base: PositiveFloat | None = Field(None, description="none: the target's base of full-attention layers")
    mask_token: str | int | None = Field(None, description="reserved entry of the vocabulary; none: the tokenizer's mask "
                                         "token, or else the first entry that the tokenizer leaves unused")
    rms_norm_eps: PositiveFloat = 1e-5
    convolution_rank: NonNegativeInt = Field(0, description="in-block dynamic convolution (DFlash 2); 0: off")
    markov_rank: NonNegativeInt = Field(0, description="low-rank Markov head (DSpark); 0: off")
    selector_top_k: NonNegativeInt = Field(0, description="greedy drafts by the best path through this many candidates per "
                                           "position (DFlash 2; needs markov_rank); 0: token by token")


class Pass(Section):
    """One pass of the target over the prompts."""

    temperature: NonNegativeFloat = Field(0.0, description="0: greedy")
    samples: PositiveInt = Field(1, description="answers per prompt")
    prompts: PositiveInt | None = Field(None, description="at most this many prompts, evenly from the files; none: all")
    where: dict[str, str] = Field(default_factory=dict, description="only prompts with these fields, e.g. kind: task")


class Regenerate(Section):
    """Self-distillation: prompts answered by the target itself, at the temperatures it will be served with."""

    prompts: list[str] = Field(default_factory=list, description="JSONL files (globs allowed) of prompts")
    prompt_field: str = "prompt"
    passes: list[Pass] = Field(default_factory=lambda: [Pass()])
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = Field(64, description="prompts answered side by side")
    endpoint: str | None = Field(None, description="base URL of an OpenAI-compatible server of the target (its key in the "
                                 "environment as OPENAI_API_KEY); none: this process")
    endpoint_model: str | None = Field(None, description="model name to ask that server for; none: the only one it serves")


class DraftLoss(Section):
    """Weights of the drafter's losses per masked position; at least one must be positive."""

    cross_entropy: NonNegativeFloat = Field(1.0, description="of the text's token")
    kl: NonNegativeFloat = Field(0.0, description="KL(target || drafter)")
    tv: NonNegativeFloat = Field(0.0, description="total variation distance = rejection probability")
    lk: NonNegativeFloat = Field(0.0, description="-log of the acceptance probability (LK, arXiv 2602.23881)")
    weighting: Literal["decay", "dpace"] = Field("decay", description="decay: exp(-(k-1)/gamma); dpace: by the expected number "
                                                 "of accepted tokens that depend on position k (arXiv 2605.18810)")
    decay_gamma: PositiveFloat = Field(7.0, description="positions over which the decay falls to 1/e")
    dpace_alpha: Fraction = Field(0.5, description="smoothing of the confidences")
    chunk_anchors: PositiveInt = Field(256, description="anchors whose logits are held at once")

    @model_validator(mode="after")
    def _not_all_zero(self):
        if self.cross_entropy == self.kl == self.tv == self.lk == 0:
            raise ValueError("dflash.loss: cross_entropy, kl, tv and lk are all 0: nothing would be trained")
        return self


class DraftOptimizer(Optimizer):
    """Muon for the matrices, AdamW for the rest (or AdamW for all)."""

    name: Literal["adamw", "muon"] = Field("muon", description="update of the matrices; everything else has AdamW")
    learning_rate: PositiveFloat = Field(3e-3, description="peak for the matrices; for muon in units of AdamW (RMS matched)")
    adamw_learning_rate: PositiveFloat = Field(3e-3, description="peak for norms, sinks, mask embedding and vocabulary tables")
    warmup_steps: NonNegativeInt = Field(20, description="linear warm-up from 0")
    betas: tuple[Fraction, Fraction] = Field((0.95, 0.95), strict=False, description="moment decays; muon uses the first")


class Acceptance(Section):
    """Measurement on held-out prompts."""

    prompts: list[str] = Field(default_factory=list, description="JSONL files of prompts; rows may have domain and kind "
                               "(task: judged at temperature 0; open: at 1; neither: at both)")
    prompt_field: str = "prompt"
    prompts_per_group: PositiveInt = Field(64, description="prompts of each domain and kind")
    max_new_tokens: PositiveInt = 160
    timed_prompts: NonNegativeInt = Field(12, description="prompts of each group decoded for wall-clock and measured length")


class DFlash(Section):
    """The drafter's training job."""

    steps: PositiveInt = Field(description="optimizer updates")
    batch_size: PositiveInt = Field(8, description="packed rows per process and step")
    sequence_length: Annotated[int, Field(ge=16)] = Field(512, description="tokens per packed row")
    anchors: PositiveInt = Field(64, description="blocks trained per row and step, at fresh positions each epoch")
    target: Literal["qat", "ptq", "base"] = Field("qat", description="qat: the result of qat/train.py; ptq: model.path, "
                                                  "experts rounded; base: model.path as it is")
    start_from: str | None = Field(None, description="folder of a drafter of the same geometry to train on, for example one "
                                   "made for the unquantized target; none: fresh weights")
    data: list[str] = Field(default_factory=list, description="own dialogues instead of regenerated ones: JSONL with prompt "
                            "and response, or text")
    features: Literal["online", "disk"] = Field("online", description="target features: computed in the loop, or once to disk")
    features_gib: PositiveFloat = Field(8.0, description="limit of the cache on disk")
    shard_drafter: bool = Field(False, description="with cluster.sharding: divide the drafter's weights, gradients and moments "
                                "among the ranks, too")
    loss: DraftLoss = Field(default_factory=DraftLoss)
    optimizer: DraftOptimizer = Field(default_factory=DraftOptimizer)
    regenerate: Regenerate = Field(default_factory=Regenerate)
    acceptance: Acceptance = Field(default_factory=Acceptance)
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 100
    keep_last: PositiveInt = 2


class Export(Section):
    """The exported checkpoint."""

    layout: Literal["auto", "native", "hf-fp8", "compressed-tensors", "gpt-oss", "bf16"] = Field(
        "auto", description="names and containers of the same codes; auto: the usual one of the model's family (native for "
        "MiMo-V2, gpt-oss, else compressed-tensors, or bf16 where its clients know no packed experts); bf16: decoded exactly")
    dense: Literal["base", "fp8"] = Field("base", description="weights besides experts: as in the base checkpoint, or (native) "
                                          "qkv and dense MLP of a bf16 base rounded to FP8 in 128 x 128 blocks")
    base_model: str | None = Field(None, description="hub name of the base checkpoint, for the model card; none: model.path")
    shard_bytes: PositiveInt = Field(5_000_000_000, description="a file is closed before it would exceed this")
    processes: PositiveInt = Field(1, description="processes that write different files side by side")
    speculators: bool = Field(False, description="also write the drafter in the format of `speculators` "
                              "(dflash-speculators/); needs one without sinks, value scale and partial rotation")
    speculators_target: str | None = Field(None, description="the target that dflash-speculators/ names: a hub's name, or a "
                                           "path, which is looked up from the reader's working directory; none: the repository "
                                           "of --push, else `..`, which is found from within that folder alone")
    drafter: Literal["matching", "any", "none"] = Field(
        "matching", description="a drafter that was trained for other weights than those exported is refused; any: it is "
        "written, with a warning and without its numbers; none: no drafter is written")
    reference_gib: NonNegativeFloat = Field(16.0, description="targets whose float32 weights take up to this much memory are "
                                            "run once, to record the drafter's reference from real features")


class Cluster(Section):
    """The machines the recipe is written for, and how the model is divided among the processes of a launch.

    nodes, accelerators_per_node, memory and bandwidths are read by --plan alone; a launch may have another number of processes.
    """

    nodes: PositiveInt = 1
    accelerators_per_node: PositiveInt = 1
    memory_gib: PositiveFloat = Field(description="memory of one accelerator")
    sharding: Literal["ddp", "zero3", "fsdp2"] = Field("ddp", description="fsdp2: weights and optimizer state are divided; "
                                                       "ddp: every process holds all; zero3: the same by DeepSpeed, which "
                                                       "can do less")
    expert_parallel: PositiveInt = Field(1, description="ranks that divide the experts of a layer among them")
    replicas: PositiveInt = Field(1, description="copies of the sharded model; gradients are averaged over them")
    hang_minutes: PositiveFloat = Field(10.0, description="a job of several processes that makes no progress for this long "
                                        "after its first step is stopped and says which rank is behind")
    offload_optimizer: bool = Field(False, description="keep master weights and optimizer state in host memory (zero3)")
    offload_weights: bool = Field(False, description="keep the weights' shards in host memory as well (zero3)")
    host_memory_gib: PositiveFloat | None = Field(None, description="host memory of one node, for offload_optimizer")
    network_gb_per_s: PositiveFloat | None = Field(None, description="GB/s that one accelerator receives from other nodes")
    link_gb_per_s: PositiveFloat | None = Field(None, description="GB/s that one accelerator receives within its node")

    @model_validator(mode="after")
    def _divides(self):
        ranks = self.nodes * self.accelerators_per_node
        if ranks % self.replicas:
            raise ValueError(f"cluster.replicas={self.replicas} does not divide {ranks} ranks")
        if ranks // self.replicas % self.expert_parallel:
            raise ValueError(f"cluster.expert_parallel={self.expert_parallel} does not divide {ranks // self.replicas} ranks")
        if self.offload_optimizer and self.host_memory_gib is None:
            raise ValueError("cluster.offload_optimizer needs cluster.host_memory_gib")
        return self


class _Checkpoint(Section):
    """Checkpoints of both training jobs; intervals and numbers are the jobs' own (`checkpoint_every`, `keep_last`)."""

    @property
    def asynchronous(self) -> bool:
        return getattr(self, "async")


# By its name in recipes, which Python keeps for itself.
Checkpoint = create_model("Checkpoint", __base__=_Checkpoint, __doc__=_Checkpoint.__doc__, **{"async": (bool, Field(
    False, description="write while training goes on, from a copy of the rank's state in host memory"))})


class Tracking(Section):
    """Where metrics go besides runs/<name>/."""

    wandb: Literal["off", "auto", "offline", "online"] = Field(
        "off",
        description="auto: online if a key is set, else offline; off without the package")
    project: str = Field("fp4-dflash", description="project on the tracker's page")
    tensorboard: bool = Field(False, description="also write TensorBoard events to runs/<name>/<job>/tensorboard")


class Recipe(Section):
    """One recipe file. `name` names the run folder runs/<name>/."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: NonNegativeInt = 0
    output: str = Field("runs", description="parent of the run folder")
    keep_earlier: NonNegativeInt | None = Field(None, description="results set aside by later runs that are kept, of each job; "
                                                "none: all")
    model: Model
    data: Data
    chat: Chat = Field(default_factory=Chat)
    quantization: Quantization = Field(default_factory=Quantization)
    qat: QAT
    drafter: Drafter | None = None
    dflash: DFlash | None = None
    export: Export = Field(default_factory=Export)
    cluster: Cluster | None = None
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)
