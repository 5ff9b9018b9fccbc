"""The only home of the tests' tolerances, each with its reason."""

# Squared error, in units of the coarse scale, by which the `mse` rule may miss the better of its two candidates. It decides
# on magnitudes rounded to multiples of 2^-13: an error of 2^-14 in each of 32 values, on a slope of at most 2.
MSE_CHOICE = 32 * 2 * 2.0**-14

# Logits and gradients of a tiny float32 decoder against another implementation or another order of the same sums:
# logits of magnitude 10 differ in their last two of 24 bits (measured maximum 4e-5).
MODEL_FP32 = {"atol": 2e-4, "rtol": 1e-4}

# Relative error (Frobenius) of a bf16 expert against float32: three roundings of at most 2^-8 (gate-up, activation, down).
EXPERTS_BF16 = 3 * 2.0**-8

# Bits per byte of the beginnings of some held-out documents over the figure published for the whole documents: beginnings have
# less context and are the least predictable part of a file. It catches a broken load or forward, which doubles the figure.
SEED_SLICE_SLACK = 1.35

# Relative error (Frobenius) of attention in bf16 against float32, outputs and gradients: scores, weights, their gradients
# and the result are each rounded once, by at most 2^-9 (measured maximum 4e-3).
ATTENTION_BF16 = 4 * 2.0**-9

# KL per token summed in float32 in another order: each term p (log p - log q) of log-probabilities of magnitude 8 carries
# an absolute error of 2^-21, averaged over tokens.
EVALUATION_KL = 1e-7

# Hidden states and gradients of a tiny float32 drafter in two orders of the same sums (unit-size values after the final norm;
# measured maximum 3e-6).
DRAFTER_FP32 = {"atol": 2e-5, "rtol": 1e-4}

# Relative error (Frobenius) of five Newton-Schulz iterations in bf16 against float64: each iteration rounds products of
# singular values near 1 by 2^-8 and multiplies errors by up to 3.4 (measured 0.01 to 0.02).
NEWTON_SCHULZ_BF16 = 0.05

# Contract C7: acceptance length predicted in training against the one that a loop or a runtime counts.
C7_ACCEPTANCE = 0.01

# Standard deviations by which a sampled frequency or mean may miss its expectation (one false alarm in 16,000).
FOUR_SIGMA = 4.0

# Relative error (Frobenius) of the expert kernel against the model's experts in float32 on the same weights and bf16 tokens:
# the kernel rounds once, SwiGLU's result to bf16, by at most 2^-9 per value; terms that cancel in the down projection may
# double that relative to their sum (measured 1.3e-3, and 2.3e-3 for a single token).
EXPERTS_KERNEL = 2.0**-8

# The same kernel's sum over three shards against one: float32 sums in another order, about 30 operations of 2^-24 on terms
# that may be ten times their sum.
EXPERTS_RANKS = 2e-5

# Relative error (Frobenius) of the attention kernel against float32 on the same bf16 queries, keys and values: the weights are
# rounded to bf16, by at most 2^-9 each, and their sum is not.
ATTENTION_KERNEL = 2.0**-8

# Relative error (Frobenius) of the row kernels against float32 on operands rounded to bf16: the result is rounded once, by at
# most 2^-9, and a normed value near a tie may enter the product one bf16 step (2^-8) away from the reference's.
ROW_KERNEL = 2.0**-8

# Relative error (Frobenius) of logits of a small model: the Triton kernels round what enters a product to bf16 (2^-9 each), the
# torch backend does not; a dozen such products lie between a token and its logits (measured 1e-2).
TRITON_LOGITS = 8 * 2.0**-8

# Relative error (Frobenius) of one compiled op with bf16 dot products against float64: activations are rounded where they enter
# a product, by at most 2^-9 each, in an MLP twice, and terms of a sum that cancel double that relative to it.
NATIVE_DOTS = 2.0**-7

# Relative error (Frobenius) of draft logits computed in bytes, of a random two-layer drafter: activations are rounded to 1/127
# of their row's largest value, which is three to five times their size: 1 % of each product's result, nine products deep.
DRAFTS_IN_BYTES = 0.08

# Masters after four float32 updates with expert parallelism, relative to the largest master: experts multiply the same rows in
# other groups, so that sums of a few hundred products differ in their last bits, and AdamW divides by roots of such sums.
EXPERT_PARALLEL_MASTERS = 1e-5
