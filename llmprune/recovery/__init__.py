"""Trains what was lost back: LoRA or full, on text, instructions or a teacher's predictions."""
