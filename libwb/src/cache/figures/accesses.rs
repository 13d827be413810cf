//! What requests found in the cache, counted block by block as the kernel module does.

use crate::cache::head::{Figure, Figures};

/// How a request met one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// It was written; else it was read.
    pub write: bool,
    /// The cache held a version of the block.
    pub hit: bool,
    /// That version was in RAM, its segment not yet written to the cache device.
    pub in_ram: bool,
    /// The request covered all sectors of the block.
    pub whole: bool,
}

impl Access {
    /// The kernel module's number of such an access.
    fn number(self) -> usize {
        let Access { write, hit, in_ram, whole } = self;
        [whole, in_ram, hit, write]
            .iter()
            .zip(0..)
            .map(|(&bit, shift)| usize::from(bit) << shift)
            .sum()
    }

    fn numbered(number: usize) -> Access {
        let bit = |shift: usize| number >> shift & 1 == 1;
        Access { write: bit(3), hit: bit(2), in_ram: bit(1), whole: bit(0) }
    }
}

/// How many blocks were met in which way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accesses([u64; 16]);

/// The numbers as they are counted.
pub(crate) struct CountedAccesses(Figures);

impl CountedAccesses {
    pub(crate) fn of(figures: &Figures) -> CountedAccesses {
        CountedAccesses(figures.clone())
    }

    /// No one else may count at this time.
    pub(crate) fn count(&mut self, access: Access) {
        let figure = Figure(Figure::ACCESSES + access.number());
        self.0.set(figure, self.0.get(figure).wrapping_add(1));
    }

    pub(crate) fn get(&self) -> Accesses {
        Accesses(std::array::from_fn(|number| self.0.get(Figure(Figure::ACCESSES + number))))
    }
}

impl Accesses {
    /// Numbers of blocks, in the kernel module's order.
    pub fn iter(&self) -> impl Iterator<Item = (Access, u64)> {
        self.0.iter().enumerate().map(|(number, &blocks)| (Access::numbered(number), blocks))
    }

    pub(crate) fn since(&self, earlier: &Accesses) -> Accesses {
        Accesses(std::array::from_fn(|number| self.0[number].saturating_sub(earlier.0[number])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_module_numbers_accesses_by_four_bits() {
        for number in 0..16 {
            assert_eq!(Access::numbered(number).number(), number);
        }
        assert_eq!(Access { write: true, hit: false, in_ram: false, whole: false }.number(), 8);
        assert_eq!(Access { write: false, hit: true, in_ram: false, whole: true }.number(), 5);
        assert_eq!(Access { write: false, hit: true, in_ram: true, whole: false }.number(), 6);
    }
}
