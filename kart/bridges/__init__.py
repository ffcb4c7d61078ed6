"""KArAt in models of other libraries, one file a library: `kart.bridges.timm`, `.transformers`,
`.multihead` (torch's own). None of them imports its library before it is needed.
"""
