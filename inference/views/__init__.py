"""What people look at: text tables, plot data apart from drawing, pictures, the report."""
