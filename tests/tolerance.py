"""The only home of the tests' tolerances, each with its reason."""

# Squared error, in units of the coarse scale, by which the `mse` rule may miss the better of its two candidates. It decides
# on magnitudes rounded to multiples of 2^-13: an error of 2^-14 in each of 32 values, on a slope of at most 2.
MSE_CHOICE = 32 * 2 * 2.0**-14
