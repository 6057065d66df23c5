"""Measure the papers' explanations of forgetting on finished runs (launch/analyze.py).

mixture     which KL divergence forgets, on mixtures of Gaussians (Retaining by Doing)
drift       loss on tasks that a stage does not train, against the distance from the base model
            (RL's Razor)
influence   effect of training on one response on other tasks, by corpus (why RFT preserves
            prior knowledge)
fisher      risk of SFT's and RFT's gradients on the same prompts (RFT naturally mitigates
            forgetting)
"""
