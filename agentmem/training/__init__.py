"""Training: data (`sources`), what an engine would run of it (`examples`), a step (`step`), the loop, a run (`run`)."""
