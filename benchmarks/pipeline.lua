-- For wrk: so many requests at once on every connection (HTTP/1.1 pipelining).
-- wrk -s pipeline.lua URL -- 8

init = function(arguments)
   local requests = {}
   for number = 1, tonumber(arguments[1]) do
      requests[number] = wrk.format()
   end
   at_once = table.concat(requests)
end

request = function()
   return at_once
end
