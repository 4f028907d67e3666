"""What the notebooks use and the engine never imports: baselines, contracts, figures, benchmarks, training."""
