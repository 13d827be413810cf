//! Aligned buffers: owned for reads, shared for writes.

use crate::format::BLOCK_BYTES;
use aligned_vec::{ABox, AVec, ConstAlign};
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;

/// An owned buffer, aligned to 4096 bytes for direct I/O.
pub struct IoBuf(ABox<[u8], ConstAlign<BLOCK_BYTES>>);

impl IoBuf {
    /// A buffer of `bytes` zeros.
    pub fn zeroed(bytes: usize) -> IoBuf {
        let mut buf: AVec<u8, ConstAlign<BLOCK_BYTES>> = AVec::with_capacity(BLOCK_BYTES, bytes);
        buf.resize(bytes, 0);
        IoBuf(buf.into_boxed_slice())
    }

    /// A buffer that holds a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> IoBuf {
        IoBuf(AVec::from_slice(BLOCK_BYTES, bytes).into_boxed_slice())
    }

    /// The block that begins at byte `at`, which must lie within the buffer.
    pub fn block_at(&self, at: usize) -> &[u8; BLOCK_BYTES] {
        self.0[at..].first_chunk().expect("a whole block within the buffer")
    }

    /// The block that begins at byte `at`, which must lie within the buffer.
    pub fn block_at_mut(&mut self, at: usize) -> &mut [u8; BLOCK_BYTES] {
        self.0[at..].first_chunk_mut().expect("a whole block within the buffer")
    }
}

impl Deref for IoBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({} bytes)", self.0.len())
    }
}

impl AsRef<[u8]> for IoBuf {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// An immutable part of a shared buffer. Cloning it copies no data.
#[derive(Clone)]
pub struct SharedBuf {
    buf: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl SharedBuf {
    /// A part of a shared buffer; `range` must lie within it. For direct I/O, both are aligned.
    pub fn part_of(
        buf: Arc<impl AsRef<[u8]> + Send + Sync + 'static>,
        range: Range<usize>,
    ) -> SharedBuf {
        assert!(range.start <= range.end && range.end <= (*buf).as_ref().len());
        SharedBuf { buf, range }
    }

    /// A part of this one; `range` must lie within it.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> SharedBuf {
        assert!(range.start <= range.end && range.end <= self.range.len());
        let range = self.range.start + range.start..self.range.start + range.end;
        SharedBuf { buf: self.buf.clone(), range }
    }

    /// The same bytes to keep for long: copied if they would keep a buffer of more than eight times
    /// their length.
    #[must_use]
    pub fn to_keep(&self) -> SharedBuf {
        let is_small = self.range.len() < (*self.buf).as_ref().len() / 8;
        if is_small { IoBuf::copy_of(self).into() } else { self.clone() }
    }
}

impl fmt::Debug for SharedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBuf({} bytes)", self.range.len())
    }
}

impl From<IoBuf> for SharedBuf {
    fn from(buf: IoBuf) -> SharedBuf {
        let range = 0..buf.len();
        SharedBuf { buf: Arc::new(buf), range }
    }
}

impl Deref for SharedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.buf).as_ref()[self.range.clone()]
    }
}
