"""One thin module per framework, named after it; nothing here is imported unless needed."""
