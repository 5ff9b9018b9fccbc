"""SmolLM2 as a Mixture of Experts: see README.md."""
