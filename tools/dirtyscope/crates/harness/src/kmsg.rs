// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Context as _, Result, bail};
use events::{Kernel, is_complaint};
use rustix::{fs::OFlags, io::Errno};
use std::{
    fs::File,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
};

const PATH: &str = "/dev/kmsg";

/// What the kernel logs from now on: `Documentation/ABI/testing/dev-kmsg`.
pub struct Messages(File);

impl Messages {
    /// Messages that are logged after this.
    pub fn from_now() -> Result<Self> {
        let nonblock = OFlags::NONBLOCK.bits() as i32;
        let mut file =
            File::options().read(true).custom_flags(nonblock).open(PATH).context(PATH)?;
        file.seek(SeekFrom::End(0)).context(PATH)?;
        Ok(Self(file))
    }

    /// Messages that were logged since the last time. Fails if some of them are lost.
    pub fn read(&mut self) -> Result<Vec<Kernel>> {
        let mut messages = Vec::new();
        let mut record = [0; 8192];
        loop {
            match self.0.read(&mut record) {
                Ok(0) => return Ok(messages),
                Ok(len) => messages.extend(parse(&String::from_utf8_lossy(&record[..len]))),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::AGAIN) => return Ok(messages),
                    Some(Errno::PIPE) => {
                        bail!("{PATH}: messages were overwritten before they were read")
                    }
                    _ => return Err(error).context(PATH),
                },
            }
        }
    }
}

/// The message of a record `priority,sequence,microseconds,flags;text`. What follows on lines of their
/// own is its context.
fn parse(record: &str) -> Option<Kernel> {
    let (prefix, text) = record.split_once(';')?;
    let seconds = prefix.split(',').nth(2)?.parse::<f64>().ok()? / 1e6;
    let text = text.lines().next()?.to_owned();
    Some(Kernel { seconds, complaint: is_complaint(&text), text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records() {
        let record = "4,512,1500000,-;WARNING: CPU: 0 at x.c:1\n SUBSYSTEM=x\n";
        let message = parse(record).unwrap();
        assert_eq!((message.seconds, message.complaint), (1.5, true));
        assert_eq!(message.text, "WARNING: CPU: 0 at x.c:1");
        assert_eq!(parse("nonsense"), None);
    }
}
