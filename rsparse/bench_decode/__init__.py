"""`python -m rsparse bench-decode`: how fast models decode, dense and sparse, beside what a practitioner would use.

    arrivals   when each token was there, and the rates that follow
    baselines  Hugging Face: eager, and its compiled static cache
    traffic    bytes that a step reads
    parts      what a step spends its time on
    settling   thresholds and realised sparsity on the inputs of decode steps
    sketches   low-rank factors of random weights, without an SVD
    measure    one run over all of them
"""
