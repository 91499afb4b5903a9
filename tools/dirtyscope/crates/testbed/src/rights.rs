// SPDX-License-Identifier: GPL-2.0-only

use anyhow::{Context as _, Result};
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities},
};

/// What this thread and this process may lock; as it was again when this is dropped.
pub struct Rights {
    capabilities: CapabilitySets,
    limit: Rlimit,
}

impl Rights {
    /// As they are.
    pub fn now() -> Result<Self> {
        let capabilities = capabilities(None).context("capget")?;
        Ok(Self { capabilities, limit: getrlimit(Resource::Memlock) })
    }

    /// Takes CAP_IPC_LOCK away and lets the process lock so many bytes; or lets it lock all it wants.
    pub fn limit(&self, bytes: Option<u64>) -> Result<()> {
        let mut effective = self.capabilities.effective;
        effective.set(CapabilitySet::IPC_LOCK, bytes.is_none());
        set_capabilities(None, CapabilitySets { effective, ..self.capabilities })
            .context("capset")?;
        self.set_memlock(bytes)
    }

    /// Says that the process may lock so many bytes, which CAP_IPC_LOCK overrides.
    pub fn set_memlock(&self, bytes: Option<u64>) -> Result<()> {
        setrlimit(Resource::Memlock, Rlimit { current: bytes, maximum: None })
            .context("setrlimit RLIMIT_MEMLOCK")
    }
}

impl Drop for Rights {
    fn drop(&mut self) {
        let limit = Rlimit { ..self.limit };
        let limit = setrlimit(Resource::Memlock, limit);
        if let Err(error) = set_capabilities(None, self.capabilities).and(limit) {
            eprintln!("dirtyscope: what may be locked stays limited: {error}");
        }
    }
}
