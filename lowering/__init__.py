"""The dak:: operators and what they become on each device."""

if __name__ != "dak_inductor.lowering":
    raise ImportError("import this package as dak_inductor.lowering; operators must register once")
