// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Context as _, Result, ensure};
use events::{
    Event,
    layout::{ALL, MAGIC, STAYS, STREAM},
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    sync::atomic::{Ordering::Release, fence},
};
use vfio_client::Memory;

/// Bytes of the memory of a log that isn't given by the user.
const SIZE: u64 = 256 << 20;

/// Bytes at most that one test may log of its operations: more than this isn't read by anybody.
const TEST_SIZE: usize = 8 << 20;

/// A stream of events in shared memory, laid out as `events::layout` says. Nobody else must write to
/// it meanwhile: see [`Log::take_over`].
pub struct Log {
    path: PathBuf,
    memory: Memory,
    /// Bytes of the stream, those that stay and those that were read.
    all: usize,
    stays: usize,
    delivered: usize,
}

impl Log {
    /// Begins a stream in the memory of `path`: a file whose size is 0, which is given one, or one that
    /// has a size, such as the BAR of a device.
    pub fn create(path: &Path) -> Result<Self> {
        let what = || format!("use {} as memory", path.display());
        let file = File::options().read(true).write(true).open(path).with_context(what)?;
        if file.metadata().with_context(what)?.len() == 0 {
            file.set_len(SIZE).with_context(what)?;
        }
        let log = Self::map(path, &file)?;
        log.publish();
        log.memory.write(0, &MAGIC);
        Ok(log)
    }

    /// Goes on with a stream that another process has begun.
    pub fn open(path: &Path) -> Result<Self> {
        let what = || format!("use {} as memory", path.display());
        let file = File::options().read(true).write(true).open(path).with_context(what)?;
        let mut log = Self::map(path, &file)?;
        log.take_over()?;
        log.delivered = log.stays;
        Ok(log)
    }

    fn map(path: &Path, file: &File) -> Result<Self> {
        let len = file.metadata()?.len() as usize;
        ensure!(len > STREAM + TEST_SIZE, "{} has {len} bytes, too few", path.display());
        let memory = Memory::of_file(file, len - len % 4096)?;
        Ok(Self { path: path.to_owned(), memory, all: 0, stays: 0, delivered: 0 })
    }

    /// The file whose memory it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Notices what another process has written, which must write no more.
    pub fn take_over(&mut self) -> Result<()> {
        let number = |at| {
            let mut bytes = [0; 8];
            self.memory.read(at, &mut bytes);
            u64::from_ne_bytes(bytes) as usize
        };
        let (stays, all) = (number(STAYS), number(ALL));
        let good = self.delivered <= stays && stays <= all && all <= self.memory.len() - STREAM;
        ensure!(good, "the log of events is damaged");
        (self.stays, self.all) = (stays, all);
        Ok(())
    }

    /// Whether the test in progress has logged so much that its operations are no longer of interest.
    pub fn is_long(&self) -> bool {
        self.all - self.stays > TEST_SIZE
    }

    /// Adds an event, which may still be taken back.
    pub fn append(&mut self, event: &Event) -> Result<()> {
        let line = event.to_line() + "\n";
        let at = STREAM + self.all;
        ensure!(line.len() <= self.memory.len() - at, "no room for more events in the log");
        self.memory.write(at, line.as_bytes());
        self.all += line.len();
        self.publish();
        Ok(())
    }

    /// Lets all events stay.
    pub fn keep(&mut self) {
        self.stays = self.all;
        self.publish();
    }

    /// Takes the events back that don't stay.
    pub fn take_back(&mut self) {
        self.all = self.stays;
        self.publish();
    }

    /// The events that stay, and were not returned yet.
    pub fn read(&mut self) -> Result<Vec<Event>> {
        let events = self.events(self.delivered, self.stays)?;
        self.delivered = self.stays;
        Ok(events)
    }

    /// The events that don't stay yet.
    pub fn rest(&self) -> Result<Vec<Event>> {
        self.events(self.stays, self.all)
    }

    fn events(&self, from: usize, to: usize) -> Result<Vec<Event>> {
        let mut bytes = vec![0; to - from];
        self.memory.read(STREAM + from, &mut bytes);
        let text = String::from_utf8(bytes)?;
        text.lines().map(|line| Ok(Event::from_line(line)?)).collect()
    }

    /// Says how long the stream is, after what is in it.
    fn publish(&self) {
        fence(Release);
        self.memory.write(ALL, &(self.all as u64).to_ne_bytes());
        self.memory.write(STAYS, &(self.stays as u64).to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use events::layout::Reader;
    use tempfile::NamedTempFile;

    fn note(text: &str) -> Event {
        Event::Note { text: text.into() }
    }

    #[test]
    fn what_is_kept_can_be_followed() {
        let file = NamedTempFile::new().unwrap();
        let mut log = Log::create(file.path()).unwrap();
        let mut reader = Reader::open(file.path()).unwrap();
        assert_eq!(reader.read().unwrap(), []);
        log.append(&note("one")).unwrap();
        assert_eq!(reader.read().unwrap(), []);
        assert_eq!(reader.rest().unwrap(), [note("one")]);
        log.keep();
        log.append(&note("two")).unwrap();
        assert_eq!(reader.read().unwrap(), [note("one")]);
        log.take_back();
        log.append(&note("three")).unwrap();
        assert_eq!(reader.rest().unwrap(), [note("three")]);

        let mut other = Log::open(file.path()).unwrap();
        assert_eq!(other.rest().unwrap(), [note("three")]);
        other.append(&note("four")).unwrap();
        other.keep();
        log.take_over().unwrap();
        assert_eq!(log.read().unwrap(), ["one", "three", "four"].map(note));
        assert_eq!(log.read().unwrap(), []);
        assert_eq!(reader.read().unwrap(), ["three", "four"].map(note));
    }
}
