"""The reference backend, in torch ops."""
