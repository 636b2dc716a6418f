//! A few of many, drawn evenly while they pass by.

/// Keeps at most so many of the items that it is shown, each with the same probability (algorithm R of Vitter, 1985). The
/// draw depends on nothing but the number of items, so that two runs over the same rows draw the same.
#[derive(Clone, Debug)]
pub struct Sample<T> {
    most: usize,
    seen: u64,
    kept: Vec<T>,
}

impl<T> Sample<T> {
    /// Keeps at most `most`.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            seen: 0,
            kept: Vec::new(),
        }
    }

    /// Shows an item, which is made only if it is kept.
    pub fn show(&mut self, make: impl FnOnce() -> T) {
        self.seen += 1;
        if self.kept.len() < self.most {
            return self.kept.push(make());
        }
        let place = mix(self.seen) % self.seen;
        if let Some(kept) = self.kept.get_mut(place as usize) {
            *kept = make();
        }
    }

    /// What was kept.
    pub fn kept(&self) -> &[T] {
        &self.kept
    }
}

/// SplitMix64's finaliser (Steele et al., 2014).
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_drawn_evenly() {
        let mut none = Sample::new(0);
        (0..9).for_each(|item| none.show(|| item));
        assert!(none.kept().is_empty());
        let mut few = Sample::new(5);
        (0..3).for_each(|item| few.show(|| item));
        assert_eq!(few.kept(), [0, 1, 2]);
        let mut many = Sample::new(400);
        (0..4000).for_each(|item| many.show(|| item));
        let mut quarters = [0; 4];
        many.kept().iter().for_each(|item| quarters[item / 1000] += 1);
        // 100 are expected of each quarter, with a standard deviation below 9.
        assert!(
            quarters.iter().all(|quarter| (60..140).contains(quarter)),
            "{quarters:?}"
        );
    }
}
