"""The logit lens: what each layer would predict if it were the last."""
