-- The action `keylatch`: checks a request with the sidecar. Needs HAProxy >= 2.6, no library.
--
-- HAProxy continues with the next rule when an action fails. So an allow is a variable that is set
-- last, and the configuration refuses every request without it.

local BRIDGE = "abns@keylatch" -- the configuration's frontend for the sidecar
local PATIENCE_MS = 4000 -- longer than the bridge's timeouts, otherwise HAProxy would retry

local IDENTITY = {
    "x-keylatch-key-id",
    "x-keylatch-key-name",
    "x-keylatch-organization-id",
    "x-keylatch-permission",
    "x-keylatch-environment",
}
local REFUSALS = {[401] = true, [403] = true, [429] = true}
local OF_REFUSALS = {
    "content-type",
    "cache-control",
    "x-keylatch-error",
    "www-authenticate",
    "retry-after",
}

local function all(values) -- HAProxy counts from 0
    local list = {}
    for place = 0, #(values or {}) do
        list[#list + 1] = values and values[place]
    end
    return list
end

local function ask(txn)
    local given = txn.http:req_get_headers()
    local headers = {
        ["host"] = {"keylatch"},
        ["x-forwarded-method"] = {txn.f:method()}, -- for KEYLATCH_VERIFY_REQUEST=forwarded
        ["x-forwarded-uri"] = {txn.f:pathq()},
    }
    if given["authorization"] then
        headers["authorization"] = all(given["authorization"]) -- two of them are refused
    end
    local permission = txn:get_var("txn.keylatch_permission")
    return core.httpclient():get{
        url = "http://keylatch/verify?permission=" .. permission,
        dst = BRIDGE,
        headers = headers,
        timeout = PATIENCE_MS,
    }
end

local function refuse(txn, answer)
    local reply = txn:reply{status = answer.status, body = answer.body}
    for _, name in ipairs(OF_REFUSALS) do
        for _, value in ipairs(all(answer.headers[name])) do
            reply:add_header(name, value)
        end
    end
    txn:done(reply)
end

core.register_action("keylatch", {"http-req"}, function(txn)
    local answer = ask(txn)
    if REFUSALS[answer.status] then
        refuse(txn, answer)
        return
    end
    if answer.status ~= 200 then
        return -- down, slow or failing: the next rule answers 503
    end
    for _, name in ipairs(IDENTITY) do
        local values = all(answer.headers[name])
        if #values ~= 1 then
            return -- not a response of keylatch's sidecar
        end
        txn.http:req_set_header(name, values[1])
    end
    txn:set_var("txn.keylatch", "allowed")
end)
