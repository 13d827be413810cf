"""CRC-32C (Castagnoli; initial value and final xor all ones), in Python alone and yet fast enough for devices."""
import functools

BLOCK = 4096
POLYNOMIAL = 0x82F63B78
TABLE = []
for value in range(256):
    for _ in range(8):
        value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
    TABLE.append(value)

# Multiples of the polynomial that have few terms: x^5685 + x^1362 + x^426 + 1, and so on. With one,
# all bits of a message above x^5685 are moved down at once, many hundred at a time, which Python
# does faster than byte by byte.
FOLDS = ((5685, 1362, 426), (1160, 544, 452, 428, 128), (290, 136, 113, 107, 32))


def register(data, state):
    """What becomes of the register when data runs through it. Bit 0 of the first byte is the highest power of x."""
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


# What each bit of a CRC becomes when a block of zeros follows. The CRC of A and then a block B is
# that of A, moved past a block of zeros, xor that of B.
PAST_BLOCK = [register(bytes(BLOCK), 1 << bit) for bit in range(32)]


def append_block(crc, block):
    """The CRC of what had this CRC and a block that follows it."""
    moved = crc32c(block)
    for bit in range(32):
        if crc >> bit & 1:
            moved ^= PAST_BLOCK[bit]
    return moved


assert crc32c(b"123456789") == 0xE3069283
assert crc32c(bytes(range(256)) * 48) == append_block(crc32c(bytes(range(256)) * 32), bytes(range(256)) * 16)
