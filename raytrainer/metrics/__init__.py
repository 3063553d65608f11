"""What is logged: values kept in each worker, reduced over all of them on the driver."""
