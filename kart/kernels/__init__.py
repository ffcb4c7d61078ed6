"""The streamed KArAt product: one entry, several engines, correct under every transform."""
