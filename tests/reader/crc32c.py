"""CRC-32C (Castagnoli; initial value and final xor all ones) in pure Python, fast enough for
devices."""
import functools

BLOCK = 4096
POLYNOMIAL = 0x82F63B78
TABLE = []
for value in range(256):
    for _ in range(8):
        value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
    TABLE.append(value)

# Multiples of the polynomial that have few terms: x^5685 + x^1362 + x^426 + 1, and so on. Each
# moves many hundred bits of a message above its highest power down at once. Python does that faster
# than byte by byte.
FOLDS = ((5685, 1362, 426), (1160, 544, 452, 428, 128), (290, 136, 113, 107, 32))


def register(data, state):
    """The register after data has run through it. Bit 0 of the first byte is the highest power."""
    bits = 8 * len(data)
    message = int.from_bytes(data, "little") ^ state
    for top, *terms in FOLDS:
        while bits > top + 7:
            step = min(top - terms[0], bits - top) & ~7
            high = message & (1 << step) - 1
            message >>= step
            for term in (*terms, 0):
                message ^= high << top - term - step
            bits -= step
    state = 0
    for byte in message.to_bytes(bits // 8, "little"):
        state = TABLE[state & 0xFF ^ byte] ^ state >> 8
    return state


@functools.lru_cache(maxsize=1 << 14)
def crc32c(data):
    """The CRC-32C of at least four bytes."""
    return register(data, 0xFFFFFFFF) ^ 0xFFFFFFFF


# What each bit of a CRC becomes when a block of zeros follows. The CRC of A followed by a block B
# is the CRC of A, moved past a block of zeros, xor the CRC of B.
PAST_BLOCK = [register(bytes(BLOCK), 1 << bit) for bit in range(32)]


def append_block(crc, block):
    """The CRC of data with the CRC `crc`, followed by `block`."""
    moved = crc32c(block)
    for bit in range(32):
        if crc >> bit & 1:
            moved ^= PAST_BLOCK[bit]
    return moved


assert crc32c(b"123456789") == 0xE3069283
NUMBERS = bytes(range(256))
assert crc32c(NUMBERS * 48) == append_block(crc32c(NUMBERS * 32), NUMBERS * 16)
