"""Recurrent depth: Huginn-0125 (arXiv 2502.05171) and models retrofitted with its recurrence
(McLeish et al., arXiv 2511.07384). All have `model_type: "huginn_raven"`."""
