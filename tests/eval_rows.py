"""One line of evals.csv, as an evaluation records it."""

EVAL_ROW = {
    "stage": 0,
    "stage_name": "base",
    "step": 0,
    "task": "a,b",
    "metric": "accuracy",
    "value": 0.5,
    "n": 4,
    "stderr": 0.25,
    "scorer": "exact",
    "template": "cot",
    "pixels": "1-2",
    "decoding": "T=0",
}
