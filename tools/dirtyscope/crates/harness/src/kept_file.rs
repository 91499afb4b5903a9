// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Context as _, Result};
use std::{fs::File, os::unix::fs::FileExt as _, sync::OnceLock};

/// Bytes that are read at a time: the kernel makes a page of text for a call.
const CHUNK: usize = 4096;

/// A file of the kernel's that is asked often, and so stays open.
pub(crate) struct KeptFile {
    path: &'static str,
    file: OnceLock<File>,
}

impl KeptFile {
    pub(crate) const fn new(path: &'static str) -> Self {
        Self { path, file: OnceLock::new() }
    }

    /// What `find` finds in its lines, of which it gets more as long as it finds nothing.
    pub(crate) fn find<T>(&self, find: impl Fn(&str) -> Option<T>) -> Result<T> {
        let path = self.path;
        let file = match self.file.get() {
            Some(file) => file,
            None => {
                let file = File::open(path).with_context(|| format!("open {path}"))?;
                self.file.get_or_init(|| file)
            }
        };
        let (mut bytes, mut len) = (Vec::new(), 0);
        loop {
            bytes.resize(len + CHUNK, 0);
            let more = file.read_at(&mut bytes[len..], len as u64);
            let more = more.with_context(|| format!("read {path}"))?;
            len += more;
            let whole = bytes[..len].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
            if let Some(found) = find(std::str::from_utf8(&bytes[..whole])?) {
                return Ok(found);
            }
            if more == 0 {
                anyhow::bail!("{path} hasn't what is looked for");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(text: &str, name: &str) -> Option<u64> {
        text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
    }

    #[test]
    fn it_is_read_as_it_is_now() {
        let path = "/proc/thread-self/comm";
        let comm = KeptFile::new(path);
        for name in ["one", "two"] {
            std::fs::write(path, name).unwrap();
            assert_eq!(comm.find(|text| Some(text.trim_end().to_owned())).unwrap(), name);
        }
    }

    #[test]
    fn what_is_far_behind_is_found_and_what_is_not_there_is_not() {
        // More than a chunk.
        let vmstat = KeptFile::new("/proc/vmstat");
        let last = std::fs::read_to_string("/proc/vmstat").unwrap();
        let last = last.lines().next_back().unwrap().split(' ').next().unwrap();
        vmstat.find(|text| after(text, last)).unwrap();
        let error = vmstat.find(|text| after(text, "nothing")).unwrap_err().to_string();
        assert!(error.contains("/proc/vmstat hasn't"), "{error}");
        let error = KeptFile::new("/proc/nothing").find(|_| Some(())).unwrap_err().to_string();
        assert!(error.contains("open /proc/nothing"), "{error}");
    }
}
