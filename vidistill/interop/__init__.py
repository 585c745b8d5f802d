"""Published checkpoints <-> ours: parameter names, file formats, step tables, and what each family of students does."""
