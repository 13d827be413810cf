# What no honest client does. The volume has 4 KiB of 1 at its beginning, and of 2 at 1 MiB. Each
# case is a connection of its own.
import os, socket, struct, sys
PATH = sys.argv[1]
OPT, REQ = 0x49484156454F5054, 0x25609513

def connect(flags=3):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(60)
    s.connect(PATH)
    greeting = take(s, 18)
    assert greeting[:8] == b'NBDMAGIC', greeting
    s.sendall(struct.pack('>I', flags))
    return s

def take(s, n):
    data = b''
    while len(data) < n:
        more = s.recv(n - len(data))
        if not more: raise EOFError
        data += more
    return data

def option(s, code, data=b'', magic=OPT, length=None):
    s.sendall(struct.pack('>QII', magic, code, len(data) if length is None else length) + data)

def reply(s):
    _, code, kind, length = struct.unpack('>QIII', take(s, 20))
    return kind, take(s, length)

def go(s):
    option(s, 7, struct.pack('>IH', 0, 0))
    while True:
        kind, _ = reply(s)
        if kind == 1: return s
        assert kind < 1 << 31, kind

def request(s, command, offset, length, data=b'', magic=REQ, flags=0):
    s.sendall(struct.pack('>IHHQQI', magic, flags, command, 5, offset, length) + data)

def simple(s):
    magic, error, cookie = struct.unpack('>IIQ', take(s, 16))
    assert magic == 0x67446698 and cookie == 5
    return error

def is_closed(s):
    try:
        while s.recv(65536): pass
    except ConnectionError: pass
    return True

# In the negotiation.
assert is_closed(connect(flags=0xffffffff))
s = connect(); option(s, 3, magic=7); assert is_closed(s)
s = connect(); option(s, 7, b'x' * 6, length=6); assert reply(s)[0] == 0x80000003
s = go(s); request(s, 3, 0, 0); assert simple(s) == 0
s = connect(); option(s, 99, b'y' * 70000); assert reply(s)[0] == 0x80000001; go(s)
s = connect(); option(s, 7, length=0xfffffff0); s.sendall(b'z' * 100000); s.close()
s = connect(); option(s, 1, b'no such export'); assert is_closed(s)
s = connect(); option(s, 6, struct.pack('>I', 4) + b'none\0\0'); assert reply(s)[0] == 0x80000006
s = connect(); option(s, 5); assert reply(s)[0] == 0x80000002
s = connect(); option(s, 8); option(s, 8); reply(s); reply(s); go(s)
s = connect(); request(s, 0, 0, 512); assert is_closed(s)
s = connect()
try:
    for _ in range(1000): option(s, 3); reply(s); reply(s)
    print('options for ever are taken')
except (EOFError, ConnectionError): pass

# In the transmission.
s = go(connect()); request(s, 3, 0, 0, magic=7); assert is_closed(s)
s = go(connect())
for command, offset, length, flags, error in [
    (0, 0, 0xffffffff, 0, 22), (0, 2**64 - 512, 512, 0, 22), (0, 1, 512, 0, 22),
    (0, 0, 0, 0, 22), (4, 2**63, 512, 0, 22), (6, 2**63, 512, 0, 28), (6, 0, 512, 16, 95),
    (77, 0, 512, 0, 22), (3, 0, 0, 0x8000, 22),
]:
    request(s, command, offset, length, flags=flags)
    found = simple(s)
    assert found == error, (command, offset, length, found)
# Oversized, but sent in full: it is skipped, and the connection stays.
request(s, 1, 0, 40 << 20, b'\7' * (40 << 20)); assert simple(s) == 22
request(s, 0, 0, 512); assert simple(s) == 0 and take(s, 512) == b'\1' * 512
s.sendall(struct.pack('>IHHQQI', REQ, 0, 2, 5, 0, 0)); assert is_closed(s)
# It goes away at each byte of a write.
whole = struct.pack('>IHHQQI', REQ, 0, 1, 5, 1 << 20, 512) + b'\6' * 512
for length in list(range(0, 60)) + [539]:
    s = go(connect()); s.sendall(whole[:length]); s.close()
# It asks for much, and takes nothing.
greedy = []
for _ in range(8):
    s = go(connect()); greedy.append(s); s.setblocking(False)
    try:
        while True: request(s, 0, 0, 1 << 20)
    except BlockingIOError: pass
s = go(connect()); request(s, 0, 1 << 20, 512); assert simple(s) == 0
assert take(s, 512) == b'\2' * 512
print('done')
