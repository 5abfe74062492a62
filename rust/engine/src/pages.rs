//! Who owns which cache page. Counts only: no tensors, no tokens.

/// A pool of numbered pages, each with the number of its owners.
///
/// A page has one owner, or several where completions share their prompt: then `retain` adds one.
#[derive(Debug)]
pub struct Pages {
    /// Owners per page; 0 = free.
    owners: Vec<u32>,
    /// Free pages; the lowest is handed out first from a fresh pool.
    free: Vec<u32>,
}

impl Pages {
    /// `total` pages, all free.
    pub fn new(total: u32) -> Self {
        Self {
            owners: vec![0; total as usize],
            free: (0..total).rev().collect(),
        }
    }

    pub fn total(&self) -> usize {
        self.owners.len()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    pub fn used(&self) -> usize {
        self.total() - self.free()
    }

    /// Append pages to `table` until it has `length`; false, and nothing taken, when too few are
    /// free.
    pub fn grow(&mut self, table: &mut Vec<u32>, length: usize) -> bool {
        let missing = length.saturating_sub(table.len());
        if missing > self.free.len() {
            return false;
        }
        let taken = self.free.split_off(self.free.len() - missing);
        for &page in taken.iter().rev() {
            self.owners[page as usize] = 1;
            table.push(page);
        }
        true
    }

    /// Add an owner to each of these pages, which must be in use.
    pub fn retain(&mut self, table: &[u32]) {
        for &page in table {
            debug_assert!(self.owners[page as usize] > 0, "page {page} is free");
            self.owners[page as usize] += 1;
        }
    }

    /// Take an owner from each page of the table and empty it; pages without owners are free again.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for page in table.drain(..).rev() {
            let owners = &mut self.owners[page as usize];
            debug_assert!(*owners > 0, "page {page} is free already");
            *owners = owners.saturating_sub(1);
            if *owners == 0 {
                self.free.push(page);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_page_is_handed_out_twice() {
        let mut pages = Pages::new(5);
        let (mut a, mut b) = (Vec::new(), Vec::new());
        assert!(pages.grow(&mut a, 2) && pages.grow(&mut b, 3));
        let mut all = [a.clone(), b.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4]);
        assert_eq!((pages.used(), pages.free(), pages.total()), (5, 0, 5));
    }

    #[test]
    fn growing_takes_all_that_is_missing_or_nothing() {
        let mut pages = Pages::new(3);
        let mut table = Vec::new();
        assert!(pages.grow(&mut table, 2));
        assert!(!pages.grow(&mut table, 4));
        assert_eq!((table.len(), pages.free()), (2, 1));
        assert!(pages.grow(&mut table, 3) && pages.grow(&mut table, 1));
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn released_pages_come_back() {
        let mut pages = Pages::new(4);
        let mut table = Vec::new();
        for _ in 0..10 {
            assert!(pages.grow(&mut table, 4));
            pages.release(&mut table);
        }
        assert_eq!((table.len(), pages.used()), (0, 0));
    }

    #[test]
    fn a_shared_page_is_free_after_its_last_owner() {
        let mut pages = Pages::new(2);
        let mut mine = Vec::new();
        assert!(pages.grow(&mut mine, 1));
        let mut yours = mine.clone();
        pages.retain(&yours);
        pages.release(&mut mine);
        assert_eq!(pages.used(), 1);
        pages.release(&mut yours);
        assert_eq!(pages.used(), 0);
    }
}
