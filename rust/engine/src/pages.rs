//! Who owns which cache page. Counts only: no tensors, no tokens.

/// A pool of numbered pages, each with the number of its owners.
///
/// A page has one owner, or several where requests share what they begin with: then `retain` adds
/// one. The prefix tree is an owner too: it `keep`s pages for requests to come.
#[derive(Debug)]
pub struct Pages {
    /// Owners per page; 0 = free.
    owners: Vec<u32>,
    /// Whether the prefix tree is one of them.
    kept: Vec<bool>,
    /// Pages that nobody but the prefix tree owns.
    idle: usize,
    /// Free pages; the lowest is handed out first from a fresh pool.
    free: Vec<u32>,
    /// How often each was handed out.
    turns: Vec<u64>,
}

impl Pages {
    /// `total` pages, all free.
    pub fn new(total: u32) -> Self {
        Self {
            owners: vec![0; total as usize],
            kept: vec![false; total as usize],
            idle: 0,
            free: (0..total).rev().collect(),
            turns: vec![0; total as usize],
        }
    }

    pub fn total(&self) -> usize {
        self.owners.len()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages of requests.
    pub fn used(&self) -> usize {
        self.total() - self.free() - self.idle
    }

    /// Pages that are kept and of no request.
    pub fn idle(&self) -> usize {
        self.idle
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
            self.turns[page as usize] += 1;
            table.push(page);
        }
        true
    }

    /// How often a page was handed out: what was written to it in an earlier turn is void.
    pub fn turn(&self, page: u32) -> u64 {
        self.turns[page as usize]
    }

    /// Add an owner to each of these pages, which must be in use.
    pub fn retain(&mut self, table: &[u32]) {
        for &page in table {
            debug_assert!(self.owners[page as usize] > 0, "page {page} is free");
            self.idle -= usize::from(self.is_idle(page));
            self.owners[page as usize] += 1;
        }
    }

    /// Make the prefix tree an owner of a page that is in use.
    pub fn keep(&mut self, page: u32) {
        debug_assert!(!self.kept[page as usize], "page {page} is kept already");
        self.retain(&[page]);
        self.kept[page as usize] = true;
    }

    /// Take a kept page from the prefix tree.
    pub fn unkeep(&mut self, page: u32) {
        debug_assert!(self.kept[page as usize], "page {page} is not kept");
        self.idle -= usize::from(self.is_idle(page));
        self.kept[page as usize] = false;
        self.give_up(page);
    }

    fn is_idle(&self, page: u32) -> bool {
        self.kept[page as usize] && self.owners[page as usize] == 1
    }

    fn give_up(&mut self, page: u32) {
        let owners = &mut self.owners[page as usize];
        debug_assert!(*owners > 0, "page {page} is free already");
        *owners = owners.saturating_sub(1);
        match *owners {
            0 => self.free.push(page),
            _ => self.idle += usize::from(self.is_idle(page)),
        }
    }

    /// Take an owner from each page of the table and empty it; pages without owners are free again.
    pub fn release(&mut self, table: &mut Vec<u32>) {
        for page in table.drain(..).rev() {
            self.give_up(page);
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

    #[test]
    fn kept_pages_are_idle_while_no_request_has_them() {
        let mut pages = Pages::new(3);
        let mut table = Vec::new();
        assert!(pages.grow(&mut table, 2));
        pages.keep(table[0]);
        assert_eq!((pages.used(), pages.idle(), pages.free()), (2, 0, 1));
        let kept = table[0];
        pages.release(&mut table);
        assert_eq!((pages.used(), pages.idle(), pages.free()), (0, 1, 2));
        pages.retain(&[kept]);
        assert_eq!((pages.used(), pages.idle()), (1, 0));
        pages.release(&mut vec![kept]);
        pages.unkeep(kept);
        assert_eq!((pages.used(), pages.idle(), pages.free()), (0, 0, 3));
    }
}
