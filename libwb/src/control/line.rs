//! Reads lines from a socket, each within a time limit.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The longest line that is read from a socket, in bytes.
const MAX_LINE: u64 = 64 * 1024;

/// Reads lines. The time limit is for a whole line, in however many pieces it arrives.
pub(super) struct Lines(BufReader<Until>);

/// A socket, and the moment until which it is read.
struct Until {
    socket: UnixStream,
    end: Instant,
}

impl Read for Until {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(Some(left))?;
        match self.socket.read(buf) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            done => done,
        }
    }
}

impl Lines {
    pub(super) fn of(socket: UnixStream) -> Lines {
        Lines(BufReader::new(Until { socket, end: Instant::now() }))
    }

    pub(super) fn socket(&mut self) -> &mut UnixStream {
        &mut self.0.get_mut().socket
    }

    /// The next line.
    pub(super) fn next(&mut self, within: Duration) -> io::Result<String> {
        self.0.get_mut().end = Instant::now() + within;
        read_line(&mut self.0)
    }
}

fn read_line(from: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    from.take(MAX_LINE).read_line(&mut line)?;
    if line.ends_with('\n') {
        return Ok(line);
    }
    let what =
        if line.is_empty() { "the connection ended" } else { "the line is cut off or too long" };
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_long_line_is_refused_without_being_read_whole() {
        let mut endless = BufReader::new(io::repeat(b'a'));
        assert!(read_line(&mut endless).is_err());
    }

    #[test]
    fn a_line_that_comes_drop_by_drop_is_not_waited_for_without_end() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let dribbling = std::thread::spawn(move || {
            // Until the reader has gone away.
            while writer.write_all(b"a").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let mut lines = Lines::of(reader);
        let late = lines.next(Duration::from_millis(100)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        drop(lines);
        dribbling.join().unwrap();
    }
}
