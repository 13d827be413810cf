# Writes blocks, and checks them, until a file appears.
import os, random, time
random.seed(18)
stop, newest, round = os.environ['STOP'], {}, 0
while not os.path.exists(stop) or round < 200:
    round += 1
    block = random.randrange(2000)
    newest[block] = round
    flags = nbd.CMD_FLAG_FUA if round % 50 == 0 else 0
    h.pwrite(round.to_bytes(8, 'big') * 512, 4096 * block, flags)
    other = random.choice(list(newest))
    assert h.pread(512, 4096 * other) == newest[other].to_bytes(8, 'big') * 64, other
for block, written in newest.items():
    assert h.pread(4096, 4096 * block) == written.to_bytes(8, 'big') * 512, block
print(round)
