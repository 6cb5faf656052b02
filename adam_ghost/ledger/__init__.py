"""The scores of a run as a data set: Parquet files that survive a crash, and questions asked of them."""
