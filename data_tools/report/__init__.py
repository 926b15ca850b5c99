"""The page of `data_tools.statistics`."""
