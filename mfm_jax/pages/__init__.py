"""Pages that people read: reports, comparisons, model cards."""
