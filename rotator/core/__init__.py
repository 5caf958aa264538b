"""Pure decisions: frozen values in, frozen values out. No I/O, no clock, no logging, no asyncio."""
