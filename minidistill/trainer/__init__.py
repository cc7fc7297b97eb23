"""The trained model, its objective and its optimizer."""
