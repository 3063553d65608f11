"""What user code sees of a run: `trainer` on the driver, `self.trainer` in workers, and the state behind them."""
